"""What an earlier run left on disk, and which of it is whole."""

from pathlib import Path

import pytest

from mlfs import MLFSError
from mlfs.training.runs import last_checkpoint, resume_point
from tests.trainers import trainer


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
