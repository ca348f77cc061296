"""The command line and what it keeps: exports never replace runs, bases are found again, records are checked."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForSequenceClassification

from mlfs import MLFSError, SearchSpace, SuperTransformer
from mlfs.cli import main
from mlfs.commands.run_folder import find_subnet
from mlfs.files import checksum
from mlfs.models import pretrained
from mlfs.supernet.folders import locked_folder
from tests.helpers.small_base import train_words, write_base, write_data
from tests.tiny_models import make

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base, data, and a run that was trained with the base's relative path."""
    folder = tmp_path_factory.mktemp("place")
    write_base(folder / "base")
    data = write_data(folder / "data")
    before = Path.cwd()
    os.chdir(folder)
    try:
        assert main(train_words("base", data, "run")) == 0
    finally:
        os.chdir(before)
    return folder


@pytest.fixture
def run(place: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(place / "run", tmp_path / "run"))


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Another folder to work in."""
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    return tmp_path / "elsewhere"


@pytest.fixture
def no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails as soon as a host is asked for."""
    import socket

    def asked(*args: Any, **_: Any) -> Any:
        pytest.fail(f"the network was asked for {args[0]}")

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("transformers.utils.hub.is_offline_mode", lambda: False)
    monkeypatch.setattr(socket, "getaddrinfo", asked)


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != ".mlfs.lock")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def refused(words: list[str], message: str, capsys: Any) -> None:
    """Fails unless the command ends with status 2 and one line that holds `message`."""
    capsys.readouterr()
    assert main(words) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if "Warning" not in line and "it/s]" not in line]
    assert len([line for line in lines if "error:" in line]) == 1, lines
    assert message in lines[-1], lines


# ---- an export never replaces a run ---------------------------------------------------------------------------------


@pytest.mark.parametrize("target", [
    "run", "run/", "./run", "x/../run", "link", "run/stage-1", "run/stage-1/checkpoint-2", "run/new", "run/stage-0/a/b",
    ".", "..", "above", "unsaved", "other",
])  # fmt: skip
@pytest.mark.parametrize("overwrite", [[], ["--overwrite"]])
def test_a_target_that_is_contains_or_lies_in_a_run_is_refused(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, target: str, overwrite: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x").mkdir()
    (tmp_path / "link").symlink_to(run)
    shutil.copytree(run / "stage-0", tmp_path / "above" / "a" / "b" / "stage-0")
    shutil.copytree(run, tmp_path / "other")
    shutil.copytree(run / "stage-0" / "checkpoint-2", tmp_path / "unsaved" / "stage-0" / "checkpoint-2")
    before = contents(tmp_path)
    refused(["export", str(run), "--output_dir", target, *overwrite], "give", capsys)
    assert contents(tmp_path) == before


def test_the_folder_of_a_run_is_not_replaced_by_code_either(run: Path, tmp_path: Path) -> None:
    from mlfs.commands.run_folder import load_run
    from mlfs.deploy.hf import write_checkpoint

    supernet, tokenizer = load_run(run)
    (tmp_path / "above").mkdir()
    shutil.move(run, tmp_path / "above" / "run")
    before = contents(tmp_path)
    for folder in ("above", "above/run", "above/run/stage-0", "above/run/new"):
        with pytest.raises(MLFSError, match="never replaced"):
            write_checkpoint(supernet, supernet.space.min, tokenizer, tmp_path / folder)
    assert contents(tmp_path) == before


def test_only_an_earlier_export_is_replaced(run: Path, tmp_path: Path, capsys: Any) -> None:
    words = ["export", str(run), "--subnet", "min", "--overwrite", "--output_dir"]
    for name, files in {"notes": ["notes.txt"], "model": ["config.json", "README.md"], "code": ["a/b.py"]}.items():
        for file in files:
            (tmp_path / name / file).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name / file).write_text("mine")
        before = contents(tmp_path / name)
        refused([*words, str(tmp_path / name)], "is no earlier export", capsys)
        assert contents(tmp_path / name) == before
    small = tmp_path / "small"
    assert main([*words, str(small)]) == 0
    refused(["export", str(run), "--output_dir", str(small)], "--overwrite to replace an earlier export", capsys)
    assert main(["export", str(run), "--subnet", "max", "--overwrite", "--output_dir", str(small)]) == 0
    assert AutoModelForSequenceClassification.from_pretrained(small).config.hidden_size == 16
    (small / "scores.txt").write_text("mine")
    before = contents(small)
    refused([*words, str(small)], "scores.txt is not of an export", capsys)
    assert contents(small) == before
    (small / "scores.txt").unlink()
    (tmp_path / "link").symlink_to(small)
    assert main([*words, str(tmp_path / "link")]) == 0
    assert (tmp_path / "link").is_symlink()
    assert AutoModelForSequenceClassification.from_pretrained(small).config.hidden_size == 8


def test_an_export_that_cannot_be_put_in_place_leaves_the_one_before(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    words = ["export", str(run), "--overwrite", "--output_dir", str(tmp_path / "small"), "--subnet"]
    assert main([*words, "min"]) == 0
    before = contents(tmp_path / "small")
    real = Path.replace

    def fails(self: Path, target: Any) -> Path:
        if self.name == "checkpoint":
            raise OSError(5, "Input/output error")
        return real(self, target)

    monkeypatch.setattr(Path, "replace", fails)
    refused([*words, "max"], "Input/output error", capsys)
    assert contents(tmp_path / "small") == before


def test_the_demo_does_not_replace_a_run(run: Path, capsys: Any) -> None:
    before = contents(run)
    for folder in (run, run / "stage-0", run / "new"):
        refused(["demo", "--output_dir", str(folder)], "give another --output_dir", capsys)
        shutil.rmtree(run / "new", ignore_errors=True)
    assert contents(run) == before


# ---- the base is found again ----------------------------------------------------------------------------------------


def test_a_relative_path_is_recorded_as_an_absolute_one_and_found_from_elsewhere(
    place: Path, elsewhere: Path, no_hub: None, capsys: Any
) -> None:
    assert json.loads((place / "run" / "mlfs.json").read_text())["base"]["name"] == str(place / "base")
    assert main(["eval", str(place / "run"), "--subnet", "min"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["samples"] == 8
    assert main(["export", str(place / "run"), "--output_dir", "small"]) == 0
    assert "base_model: base\n" in (elsewhere / "small" / "README.md").read_text()  # not whose folder it was in


@pytest.mark.parametrize("verb", ["eval", "export"])
def test_a_base_that_moved_is_named_by_a_flag_and_the_hub_is_not_asked_for_it(
    place: Path, run: Path, elsewhere: Path, no_hub: None, capsys: Any, verb: str
) -> None:
    moved = Path(shutil.move(place / "base", place / "moved"))
    try:
        words = [verb, str(run), *(["--output_dir", "small"] if verb == "export" else [])]
        refused(words, f"the base {str(place / 'base')!r} cannot be loaded", capsys)
        refused([*words, "--model", "./nowhere"], "elsewhere/nowhere", capsys)
        assert main([*words, "--model", os.path.relpath(moved)]) == 0
    finally:
        shutil.move(moved, place / "base")


def test_another_model_is_refused_as_the_base(run: Path, tmp_path: Path, no_hub: None, capsys: Any) -> None:
    other = write_base(tmp_path / "other", seed=1)
    refused(["eval", str(run), "--model", str(other)], "the base is not the one", capsys)


@pytest.mark.parametrize("name", ["./nowhere", "../nowhere", "~/nowhere", "/no/where", "a/b/c", "no where", "nowhere/"])
def test_a_path_without_a_folder_is_refused_and_the_hub_is_not_asked(
    place: Path, elsewhere: Path, no_hub: None, capsys: Any, name: str
) -> None:
    data = (str(place / "data" / "train.tsv"), str(place / "data" / "dev.tsv"))
    refused(train_words(name, data, "new"), name, capsys)


def test_a_folder_that_came_from_the_hub_is_found_there_when_it_is_gone(
    place: Path, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cached = tmp_path / "models--someone--base" / "snapshots" / "0123"
    shutil.copytree(place / "base", cached)
    data = (str(place / "data" / "train.tsv"), str(place / "data" / "dev.tsv"))
    assert main([*train_words(cached, data, tmp_path / "new"), "--stages_to_train", "0"]) == 0
    base = json.loads((tmp_path / "new" / "mlfs.json").read_text())["base"]
    assert (base["name"], base["hub_name"]) == (str(cached), "someone/base")
    shutil.rmtree(tmp_path / "models--someone--base")
    asked = []

    def find(name: str) -> str:
        asked.append(name)
        return str(place / "base")

    monkeypatch.setattr(pretrained, "find_model", find)
    assert main(["eval", str(tmp_path / "new")]) == 0
    assert asked == ["someone/base"]


# ---- records of the data and of the results -------------------------------------------------------------------------


def swap(path: Path, fresh_checksum: bool) -> None:
    """Swaps the two labels of a data.json, as by hand."""
    values = json.loads(path.read_text())
    values["id2label"] = {"0": values["id2label"]["1"], "1": values["id2label"]["0"]}
    del values["checksum"]
    if fresh_checksum:
        values["checksum"] = checksum(values)
    path.write_text(json.dumps(values))


@pytest.mark.parametrize("fault", ["swapped", "swapped, another run's", "changed", "cut", "empty", "deep", "no object"])
def test_a_record_of_the_data_that_is_not_this_runs_is_refused(run: Path, capsys: Any, fault: str) -> None:
    path = run / "data.json"
    text = path.read_text()
    if fault.startswith("swapped"):
        swap(path, fresh_checksum="another" in fault)
    else:
        changed = {
            "changed": text.replace('"max_seq_length": null', '"max_seq_length": 3'), "cut": text[:50], "empty": "",
            "deep": "[" * 100_000, "no object": "[1]",
        }  # fmt: skip
        path.write_text(changed[fault])
    assert path.read_text() != text
    for folder in (run, run / "stage-1"):
        refused(["eval", str(folder)], "data.json is", capsys)
    assert main(["export", str(run), "--output_dir", str(run.parent / "small")]) == 0  # which needs no data


def test_a_stage_is_evaluated_on_the_data_of_its_run(run: Path, capsys: Any) -> None:
    assert main(["eval", str(run / "stage-1"), "--subnet", "min"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["samples"] == 8


@pytest.mark.parametrize("resume", [[], ["--resume_from_checkpoint", "true"]])
def test_training_that_is_refused_records_nothing(place: Path, run: Path, capsys: Any, resume: list[str]) -> None:
    other = write_data(run.parent / "other")
    for path in other:
        Path(path).write_text(Path(path).read_text().replace("\tgood", "\tawful"))
    if resume:
        shutil.rmtree(run / "stage-2")
        (run / "results.json").unlink()
    before = contents(run)
    message = "began with the labels" if resume else "holds a run already"
    refused([*train_words(place / "base", other, run), *resume], message, capsys)
    assert contents(run) == before


def test_training_that_is_refused_records_nothing_of_the_rank_either(place: Path, run: Path, capsys: Any) -> None:
    data = (str(place / "data" / "dev.tsv"), str(place / "data" / "dev.tsv"))
    shutil.rmtree(run / "stage-2")
    before = (run / "data.json").read_bytes()
    words = [*train_words(place / "base", data, run), "--rank", "3", "--resume_from_checkpoint", "true"]
    refused(words, "another rank", capsys)
    assert (run / "data.json").read_bytes() == before


@pytest.mark.parametrize("text", ["", "{", "[]", '{"palette": 3}', '{"palette": [{"name": "a"}]}', "[" * 100_000])
def test_damaged_results_are_read_only_for_a_name_that_they_hold(run: Path, capsys: Any, text: str) -> None:
    (run / "results.json").write_text(text)
    sizes = '{"hidden": 8, "heads": 1, "ffn": 12, "layers": 1}'
    for subnet in ("max", "min", sizes):
        assert main(["eval", str(run), "--subnet", subnet]) == 0
    refused(["eval", str(run), "--subnet", "medium"], "results.json is damaged", capsys)


def test_a_changed_size_in_the_results_is_noticed(run: Path, capsys: Any) -> None:
    path = run / "results.json"
    path.write_text(path.read_text().replace('"ffn": 24', '"ffn": 12'))
    refused(["eval", str(run), "--subnet", "medium-wide"], "results.json is damaged", capsys)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize(
    "listed,fault",
    [(True, "changed"), (True, "cut"), (True, "gone"), (False, "cut")],  # without a list some cannot be told
)
def test_a_damaged_tokenizer_is_refused_in_one_line(
    run: Path, capsys: Any, name: str, listed: bool, fault: str
) -> None:
    path = run / name
    text = path.read_text()
    path.write_text(text.replace("fine", "dull") if fault == "changed" else text[: len(text) // 2])
    if fault == "gone":
        path.unlink()
    if fault == "changed" and name == "tokenizer_config.json":
        path.write_text(text.replace("[UNK]", "fine"))
    if not listed:
        (run / "files.json").unlink()
    refused(["eval", str(run)], f"the tokenizer in {run} is damaged", capsys)
    refused(["export", str(run), "--output_dir", str(run.parent / "small")], "the tokenizer in", capsys)
    assert not (run.parent / "small").exists()


# ---- refused before anything is loaded ------------------------------------------------------------------------------


@pytest.fixture
def loads_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def loaded(*_: Any, **__: Any) -> Any:
        pytest.fail("data or model was loaded before the options were refused")

    for name in ("load_raw", "load_tokenizer", "load_model"):
        monkeypatch.setattr(f"mlfs.commands.train.{name}", loaded)


@pytest.mark.parametrize("words,message", [
    (["--output_dir", "{tmp}/file"], "is a file"), (["--output_dir", "{tmp}/file/below"], "is a file"),
    (["--output_dir", "/proc/mlfs"], "cannot be written"), (["--output_dir", "{tmp}/" + "n" * 300], "name too long"),
    (["--output_dir", "{tmp}/" + "long/" * 1500], "File name too long"),
    (["--output_dir", "{run}"], "holds a run already"), (["--resume_from_checkpoint", "{tmp}/none"], "no such folder"),
    (["--resume_from_checkpoint", "{tmp}"], "no stage or checkpoint there is whole"),
    (["--learning_rate", "nan"], "learning_rate is nan"), (["--learning_rate", "inf"], "expected a finite number"),
    (["--stage_learning_rates", "1e-3", "nan", "1e-3"], "stage_learning_rates is nan"),
    (["--distill_beta", "nan"], "distill_beta is nan"), (["--weight_decay", "nan"], "weight_decay is nan"),
    (["--per_device_train_batch_size", "0"], "expected at least 1"),
    (["--per_device_eval_batch_size", "-1"], "expected at least 1"),
    (["--gradient_accumulation_steps", "0"], "expected at least 1"), (["--seed", "-1"], "expected at least 0"),
    (["--seed", "99999999999999999999"], "less than 2**32"), (["--report_to", "wandb"], "requires wandb"),
    (["--report_to", "nothing-there"], "is not supported"), (["--deepspeed", "ds.json"], "deepspeed"),
    (["--accelerator_config", "missing.json"], "missing.json"), (["--bf16", "true", "--use_cpu", "false"], "bf16"),
    (["--optim", "adamw_bnb_8bit"], "bitsandbytes"), (["--lr_scheduler_kwargs", "no.json"], "expected a JSON object"),
    (["--use_liger_kernel", "true"], "use_liger_kernel"),
])  # fmt: skip
def test_options_are_refused_in_one_line_before_data_and_model_are_loaded(
    place: Path, run: Path, tmp_path: Path, loads_nothing: None, capsys: Any, words: list[str], message: str
) -> None:
    (tmp_path / "file").write_text("mine")
    data = (str(place / "data" / "train.tsv"), str(place / "data" / "dev.tsv"))
    before = contents(tmp_path)
    given = [word.format(tmp=tmp_path, run=run) for word in words]
    refused([*train_words(place / "base", data, tmp_path / "new"), *given], message, capsys)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("words,message", [
    (["--fsdp", "full_shard"], "fsdp"), (["--torch_compile", "true", "--torch_compile_backend", "x"], "Backend"),
    (["--push_to_hub", "true", "--hub_model_id", "a/b"], "push_to_hub"),
    (["--metric_for_best_model", "x", "--load_best_model_at_end", "true", "--eval_strategy", "steps",
      "--eval_steps", "2"], "eval_x"),
])  # fmt: skip
def test_options_that_transformers_reads_late_are_refused_in_one_line(
    place: Path, tmp_path: Path, capsys: Any, words: list[str], message: str
) -> None:
    data = (str(place / "data" / "train.tsv"), str(place / "data" / "dev.tsv"))
    refused([*train_words(place / "base", data, tmp_path / "new"), *words], message, capsys)


@pytest.mark.parametrize("verb,words,message", [
    ("eval", ["--batch_size", "0"], "at least 1"), ("eval", ["--batch_size", "-1"], "at least 1"),
    ("eval", ["--subnet", "tiny"], "expected one of"),
    ("export", ["--output_dir", "{tmp}/file"], "is a file"), ("export", ["--output_dir", "/proc/mlfs/x"], "cannot be"),
    ("export", ["--output_dir", "{tmp}/" + "n" * 300], "File name too long"),
    ("demo", ["--output_dir", "{tmp}/file"], "is a file"), ("demo", ["--output_dir", "/proc/mlfs/x"], "cannot be"),
])  # fmt: skip
def test_faulty_words_of_other_verbs_are_refused_in_one_line(
    run: Path, tmp_path: Path, capsys: Any, verb: str, words: list[str], message: str
) -> None:
    (tmp_path / "file").write_text("mine")
    before = contents(tmp_path)
    given = [word.format(tmp=tmp_path) for word in words]
    refused([verb, *([] if verb == "demo" else [str(run)]), *given], message, capsys)
    assert contents(tmp_path) == before


def test_a_run_folder_with_a_name_that_is_too_long_is_refused_in_one_line(capsys: Any) -> None:
    refused(["eval", "n" * 300], "File name too long", capsys)


def test_a_second_training_in_one_folder_is_refused_in_one_line(place: Path, tmp_path: Path) -> None:
    data = (str(place / "data" / "train.tsv"), str(place / "data" / "dev.tsv"))
    with locked_folder(tmp_path / "new"):
        words = train_words(place / "base", data, tmp_path / "new")
        done = subprocess.run([sys.executable, "-m", "mlfs", *words], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2 and "another process writes to" in done.stderr.splitlines()[-1], done.stderr
    assert "Traceback" not in done.stderr and os.listdir(tmp_path / "new") == [".mlfs.lock"]
    assert main(words) == 0


DAMAGES = {
    "nested": b"[" * 100_000,
    "no text": b"\xff\xfe\x00",
    "empty": b"",
    "a list": b"[1]",
    "nothing": b"null",
    "no fields": b"{}",
}


@pytest.mark.parametrize(
    ("verb", "damage"),
    [
        *((verb, damage) for verb in ("eval", "export") for damage in DAMAGES),
        ("train", "nested"),
        ("train", "no fields"),
    ],
)
def test_whatever_a_json_file_of_a_run_holds_is_read_or_refused_in_one_line(
    verb: str, damage: str, place: Path, tmp_path: Path, capsys: Any
) -> None:
    names = sorted(path.relative_to(place / "run") for path in (place / "run").glob("*.json"))
    names += [Path("stage-2", name) for name in ("mlfs.json", "files.json", "trainer_state.json")]
    assert {"mlfs.json", "data.json", "results.json", "tokenizer.json", "files.json"} <= {str(name) for name in names}
    outcomes, data = set(), write_data(tmp_path / "data")
    for name in names:
        run = tmp_path / "run"
        shutil.copytree(place / "run", run)
        (run / name).write_bytes(DAMAGES[damage])
        words = {
            "eval": ["eval", str(run), "--subnet", "min"],
            "export": ["export", str(run), "--subnet", "min", "--output_dir", str(tmp_path / "small")],
            "train": [*train_words(place / "base", data, run), "--resume_from_checkpoint", "true"],
        }  # fmt: skip
        status = main(words[verb])
        error = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
        assert status in (0, 2) and len(error) == status // 2, (name, error)
        outcomes.add(status)
        for folder in (run, tmp_path / "small"):
            shutil.rmtree(folder, ignore_errors=True)
    assert verb == "train" or outcomes == {0, 2}


@pytest.mark.parametrize("text", ["{size}", "{json}", "  {size} "])
def test_a_size_may_be_copied_from_the_table(text: str) -> None:
    space = SearchSpace((48, 32), (6, 4), (40, 20), (4, 2))
    supernet = SuperTransformer(make("bert", "ForSequenceClassification"), space, rank=0)
    words = text.format(size=space.min, json=space.min.to_json())
    assert find_subnet(supernet, words) == space.min
    with pytest.raises(MLFSError, match="layers=3 is not one of"):
        find_subnet(supernet, "48/6/40/3")
