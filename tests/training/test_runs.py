"""What an earlier run left on disk, and which of it is whole."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import mlfs.training.saving as saving
from mlfs import MLFSError
from mlfs.training import runs
from mlfs.training.file_list import listed, write_list
from mlfs.training.runs import is_whole, last_checkpoint, resume_point
from tests.trainers import assert_same, own, trainer


def test_a_half_written_checkpoint_is_passed_over(tmp_path: Path) -> None:
    t = trainer(tmp_path, stages_to_train=[0])
    t.train()
    folder = tmp_path / "stage-0"
    assert last_checkpoint(folder) == folder / "checkpoint-8"
    state = folder / "checkpoint-8" / "trainer_state.json"
    state.write_text(state.read_text()[:50])
    assert last_checkpoint(folder) == folder / "checkpoint-6"
    (folder / "checkpoint-6" / "mlfs.json").unlink()
    assert last_checkpoint(folder) == folder / "checkpoint-3"
    with pytest.raises(MLFSError, match="half-written"):
        trainer(tmp_path, stages_to_train=[0]).train(resume_from_checkpoint=str(folder / "checkpoint-6"))


def test_a_run_goes_on_in_its_first_unfinished_stage(tmp_path: Path) -> None:
    trainer(tmp_path, stages_to_train=[0]).train()
    begun = tmp_path / "stage-0" / "checkpoint-3"
    assert resume_point(tmp_path, [0, 1], False) == (tmp_path, None)
    assert resume_point(tmp_path, [0, 1], True) == (tmp_path, None)
    assert resume_point(tmp_path, [0, 1], str(begun)) == (tmp_path, begun)
    (tmp_path / "stage-0" / "mlfs.json").unlink()
    assert resume_point(tmp_path / "other", [0, 1], str(tmp_path)) == (tmp_path, begun.parent / "checkpoint-8")
    with pytest.raises(MLFSError, match="no such folder"):
        resume_point(tmp_path, [0, 1], str(tmp_path / "nowhere"))


# ---- damaged checkpoints --------------------------------------------------------------------------------------------

ONE_STAGE: dict[str, Any] = {"stages_to_train": [1]}
LEARNED: dict[str, Any] = {"stages_to_train": [1], "projection": "learned"}
FILES = ("mlfs.json", "stages-*.safetensors", "optimizer.pt", "scheduler.pt",
         "rng_state.pth", "trainer_state.json", "training_args.json", "files.json")  # fmt: skip


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor]]:
    """A run of stage 1, with all its checkpoints, and what it ended with."""
    folder = tmp_path_factory.mktemp("runs") / "unbroken"
    whole = trainer(folder, **ONE_STAGE)
    whole.train()
    return folder, own(whole.supernet)


@pytest.fixture
def warnings_of_runs(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    said: list[str] = []
    monkeypatch.setattr(runs.logger, "warning", said.append)
    return said


def copied(run: Path, folder: Path) -> Path:
    """Copies the run as it was when it was cut off after its checkpoint at step 6."""
    shutil.copytree(run / "stage-1", folder / "stage-1", ignore=shutil.ignore_patterns("checkpoint-8"))
    for path in (folder / "stage-1").iterdir():
        if path.is_file():
            path.unlink()
    return folder


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_a_checkpoint_lists_all_its_files(unbroken: tuple[Path, Any]) -> None:
    checkpoint = unbroken[0] / "stage-1" / "checkpoint-6"
    names = {path.name for path in checkpoint.iterdir()}
    assert set(listed(checkpoint)) == names - {"files.json"}
    assert all(any(Path(name).match(pattern) for name in names) for pattern in FILES)


@pytest.mark.parametrize("fault", [flip, Path.unlink])
@pytest.mark.parametrize("pattern", FILES)
def test_a_damaged_checkpoint_falls_back_to_the_one_before_and_says_so(
    unbroken: tuple[Path, dict[str, torch.Tensor]],
    warnings_of_runs: list[str],
    tmp_path: Path,
    pattern: str,
    fault: Callable[[Path], None],
) -> None:
    run = copied(unbroken[0], tmp_path / "run")
    newest = run / "stage-1" / "checkpoint-6"
    (path,) = newest.glob(pattern)
    fault(path)
    again = trainer(run, **ONE_STAGE)
    again.train(resume_from_checkpoint=True)
    assert any(f"{newest} is half-written or damaged" in line and "passed over" in line for line in warnings_of_runs)
    assert again.state.log_history[0]["step"] <= 4  # the logs from the checkpoint at step 3 on
    assert_same(unbroken[1], own(again.supernet))
    assert is_whole(newest)  # it was written anew
    for name in FILES:
        assert len(list(newest.glob(name))) == 1


@pytest.mark.parametrize("pattern", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_a_damaged_checkpoint_that_is_named_is_refused(
    unbroken: tuple[Path, Any], tmp_path: Path, pattern: str
) -> None:
    newest = copied(unbroken[0], tmp_path / "run") / "stage-1" / "checkpoint-6"
    flip(newest / pattern)
    with pytest.raises(MLFSError, match=rf"damaged \({pattern} is not what was saved\)"):
        trainer(tmp_path / "run", **ONE_STAGE).train(resume_from_checkpoint=str(newest))


@pytest.mark.parametrize("fault", [flip, Path.unlink])
def test_damaged_projections_fall_back_too(
    warnings_of_runs: list[str], tmp_path: Path, fault: Callable[[Path], None]
) -> None:
    trainer(tmp_path, **LEARNED).train()
    (tmp_path / "stage-1" / "mlfs.json").unlink()
    newest = tmp_path / "stage-1" / "checkpoint-8"
    fault(newest / "projections.safetensors")
    trainer(tmp_path, **LEARNED).train(resume_from_checkpoint=True)
    assert any(f"{newest} is half-written or damaged (projections" in line for line in warnings_of_runs)
    assert is_whole(newest)


class _Runs:
    """Runs code when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_code_in_a_checkpoint_does_not_run(unbroken: tuple[Path, Any], tmp_path: Path, name: str) -> None:
    """Also where whoever put it there wrote a list of files that fits."""
    checkpoint = copied(unbroken[0], tmp_path / "run") / "stage-1" / "checkpoint-6"
    torch.save({"state": _Runs(tmp_path / "ran")}, checkpoint / name)
    write_list(checkpoint)
    assert is_whole(checkpoint)
    with pytest.raises(MLFSError, match="holds more than tensors") as raised:
        trainer(tmp_path / "run", **ONE_STAGE).train(resume_from_checkpoint=True)
    assert "\n" not in str(raised.value) and not (tmp_path / "ran").exists()


def test_an_older_checkpoint_is_deleted_only_once_the_next_is_whole(tmp_path: Path, monkeypatch: Any) -> None:
    real, seen = saving.rotate_checkpoints, []

    def rotate(folder: str, *args: Any, **kwargs: Any) -> None:
        seen.append([is_whole(path) for path in sorted(Path(folder).glob("checkpoint-*"))])
        real(folder, *args, **kwargs)

    monkeypatch.setattr(saving, "rotate_checkpoints", rotate)
    t = trainer(tmp_path, stages_to_train=[0], save_total_limit=1)
    t.train()
    assert seen == [[True], [True, True], [True, True]] and t.args.save_total_limit == 1
    assert [path.name for path in (tmp_path / "stage-0").glob("checkpoint-*")] == ["checkpoint-8"]
