"""The options of training: what is refused, and how."""

from pathlib import Path
from typing import Any

import pytest

from mlfs import MLFSError
from mlfs.training.execution import EXECUTIONS
from mlfs.training.sampling import SAMPLINGS
from tests.trainers import trainer


@pytest.mark.parametrize("options,message", [
    ({"stages_to_train": [1, 0]}, "ascending"), ({"stage_epochs": [1.0, 2.0]}, "one for each"),
    ({"stage_steps": [0]}, "positive"), ({"distill_alpha": 1.5}, "distill_alpha"), ({"gamma": -1}, "gamma"),
    ({"subnets_per_step": 0}, "subnets_per_step"), ({"order": "best"}, "order"), ({"palette": "{"}, "JSON"),
    ({"palette": '{"x": {"hidden": 47, "heads": 6, "ffn": 40, "layers": [0]}}'}, "outside the space"),
    ({"distill_beta": [0.1, 0.2]}, "4 layers"), ({"temperature": 0.0}, "temperature"),
])  # fmt: skip
def test_bad_option_is_refused_with_its_name(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(MLFSError, match=message):
        trainer(tmp_path, **options)


@pytest.mark.parametrize("option, known", [("subnet_sampling", SAMPLINGS), ("subnet_execution", EXECUTIONS)])
def test_an_unknown_name_is_refused_with_those_that_are_registered(option: str, known: Any, tmp_path: Path) -> None:
    with pytest.raises(MLFSError, match=f"{option}='best': expected one of {', '.join(known)}"):
        trainer(tmp_path, **{option: "best"})
