"""`mlfs finish`: one size of a run trains on alone, and is written as a plain checkpoint."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from mlfs.cli import main
from tests.helpers.small_base import train_words, write_base, write_data


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finish")
    words = train_words(write_base(folder / "base"), write_data(folder / "data"), folder / "run")
    assert main(words) == 0
    return folder / "run"


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_size_is_finished_and_loads_without_mlfs(run: Path, tmp_path: Path, capsys: Any) -> None:
    before = files(run)
    words = ["finish", str(run), "--subnet", "min", "--output_dir", str(tmp_path / "out"), "--num_train_epochs", "5"]
    words += ["--learning_rate", "1e-2", "--batch_size", "4"]
    capsys.readouterr()
    assert main(words) == 0
    found = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert found["after"]["loss"] < found["before"]["loss"]
    assert files(run) == before
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert model.config.hidden_size == 8 and model.config.id2label == {0: "bad", 1: "good"}
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("fine film")["input_ids"]
    assert "trained on alone" in (tmp_path / "out" / "README.md").read_text()
    code = (
        "import sys; sys.modules['mlfs'] = None\n"
        "from transformers import pipeline\n"
        f"ask = pipeline('text-classification', {str(tmp_path / 'out')!r})\n"
        "print([answer['label'] for answer in ask(['a fine film', 'the very dull play'])])"
    )
    answers = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=300)
    texts = AutoTokenizer.from_pretrained(tmp_path / "out")(
        ["a fine film", "the very dull play"], return_tensors="pt", padding=True
    )
    expected = [model.config.id2label[i] for i in model(**texts).logits.argmax(-1).tolist()]
    assert answers.stdout.strip().splitlines()[-1] == str(expected)
    # again: the folder is taken, unless it is to be replaced
    assert main(words) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert main([*words, "--overwrite"]) == 0


@pytest.mark.parametrize(("words", "message"), [
    (["--subnet", "none"], "expected one of max"),
    (["--subnet", "min", "--batch_size", "0"], "expected at least 1"),
    (["--subnet", "min", "--learning_rate", "nan"], "nan"),
    (["--subnet", "min", "--train_file", "nowhere.tsv"], "nowhere.tsv"),
    ([], "--subnet"),
])  # fmt: skip
def test_what_cannot_be_finished_is_said_in_one_line(
    run: Path, tmp_path: Path, capsys: Any, words: list[str], message: str
) -> None:
    capsys.readouterr()
    assert main(["finish", str(run), "--output_dir", str(tmp_path / "out"), *words]) == 2
    said = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert len(said) == 1 and message in said[0]
    assert not (tmp_path / "out").exists()


def test_a_run_is_no_target(run: Path, capsys: Any) -> None:
    before = files(run)
    assert main(["finish", str(run), "--subnet", "min", "--output_dir", str(run / "small")]) == 2
    assert "never replaced" in capsys.readouterr().err and files(run) == before


def test_other_data_may_be_named(run: Path, tmp_path: Path, capsys: Any) -> None:
    train, _ = write_data(tmp_path / "more")
    words = ["finish", str(run), "--subnet", "16/2/24/1", "--output_dir", str(tmp_path / "out"), "--max_steps", "2"]
    assert main([*words, "--train_file", train, "--max_train_samples", "4"]) == 0
    assert json.loads(capsys.readouterr().out.strip().splitlines()[-1])["subnet"] == "16/2/24/1"
