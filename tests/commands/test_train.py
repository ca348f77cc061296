"""What `mlfs train` says of a run while it goes on, and at its end."""

from pathlib import Path
from typing import Any

import pytest

from mlfs.cli import main
from tests.helpers.small_base import train_words, write_base, write_data


@pytest.mark.parametrize("stages", [["0", "1", "2"], ["0"]])
def test_it_says_how_every_size_compares_with_always_the_same_answer(
    stages: list[str], tmp_path: Path, capsys: Any
) -> None:
    base, data = write_base(tmp_path / "base"), write_data(tmp_path / "data")
    words = train_words(base, data, tmp_path / "run")
    assert main([*words, "--stages_to_train", *stages, "--learning_rate", "1e-9"]) == 0  # so that nothing is learned
    said = capsys.readouterr().out
    after_first, _, at_the_end = said.partition("name  ")
    baseline = "always answering the most frequent class scores"
    assert ("after stage 0 the whole model scores" in after_first) == (len(stages) > 1)
    assert after_first.count(baseline) == after_first.count("WARNING: not clearly better") == int(len(stages) > 1)
    assert at_the_end.count(baseline) == 1
    assert "WARNING: not clearly better than the most frequent class: max" in at_the_end
    assert "train longer (num_train_epochs)" in at_the_end
