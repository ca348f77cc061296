"""Where a run goes on, what it may write over, and that the run folder holds what was trained last."""

import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from mlfs import MLFSError, SuperTransformer
from mlfs.supernet.checkpoint import read_values
from mlfs.supernet.folders import locked_folder
from mlfs.training import runs
from mlfs.training import trainer as training
from tests.tiny_models import make
from tests.trainers import assert_same, own, trainer

OPTIONS: dict[str, Any] = {"stage_steps": [3], "save_steps": 2, "order": "magnitude"}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor]]:
    """A run of all stages, and what it ended with."""
    folder = tmp_path_factory.mktemp("runs") / "finished"
    whole = trainer(folder, **OPTIONS)
    whole.train()
    return folder, own(whole.supernet)


@pytest.fixture
def run(finished: tuple[Path, Any], tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished[0], tmp_path / "run"))


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Stage and step of every training step taken."""
    taken: list[tuple[int, int]] = []
    real = training.MLFSTrainer.training_step

    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        taken.append((self.stage, self.state.global_step + 1))
        return real(self, *args, **kwargs)

    monkeypatch.setattr(training.MLFSTrainer, "training_step", step)
    return taken


def saved(folder: Path) -> dict[str, torch.Tensor]:
    return own(SuperTransformer.from_pretrained(folder, make("bert", "ForSequenceClassification")))


def contents(folder: Path) -> dict[str, bytes]:
    """The bytes of every file below a folder, but for the lock."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != ".mlfs.lock")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def hold_stage(run: Path, stage: int | None) -> None:
    """Has the run folder itself hold what a stage ended with, or nothing, as where a run was cut off."""
    for path in run.iterdir():
        if path.is_file():
            path.unlink()
    if stage is not None:
        for path in (run / f"stage-{stage}").iterdir():
            if path.is_file():
                shutil.copy(path, run)


# ---- the run folder holds what was trained last ---------------------------------------------------------------------


@pytest.mark.parametrize("held", [1, 0, None])
@pytest.mark.parametrize("gone", [(), (0,), (0, 1)])
def test_a_finished_run_that_is_resumed_holds_its_last_stage_everywhere(
    run: Path, finished: tuple[Path, Any], steps: list[Any], held: int | None, gone: tuple[int, ...]
) -> None:
    """Cut off between saving the last stage and the run folder, or with folders of earlier stages deleted."""
    hold_stage(run, held)
    for stage in gone:
        shutil.rmtree(run / f"stage-{stage}")
    again = trainer(run, **OPTIONS)
    again.train(resume_from_checkpoint=True)
    assert steps == []
    assert read_values(run) == read_values(run / "stage-2")
    for weights in (own(again.supernet), saved(run), saved(run / "stage-2")):
        assert_same(finished[1], weights)


def test_a_run_folder_whose_save_was_cut_off_is_saved_again(run: Path, finished: tuple[Path, Any]) -> None:
    tensors = next(run.glob("stages-*.safetensors"))
    tensors.write_bytes(tensors.read_bytes()[:-10])
    trainer(run, **OPTIONS).train(resume_from_checkpoint=True)
    assert_same(finished[1], saved(run))


@pytest.mark.parametrize("gone", [(), (0,)])
def test_a_run_goes_on_in_a_stage_whose_predecessors_are_gone(
    run: Path, finished: tuple[Path, Any], steps: list[Any], gone: tuple[int, ...]
) -> None:
    shutil.rmtree(run / "stage-2")
    (run / "stage-1" / "mlfs.json").unlink()
    shutil.rmtree(run / "stage-1" / "checkpoint-3")
    for stage in gone:
        shutil.rmtree(run / f"stage-{stage}")
    trainer(run, **OPTIONS).train(resume_from_checkpoint=True)
    assert steps == [(1, 3), (2, 1), (2, 2), (2, 3)]
    assert_same(finished[1], saved(run))


def test_a_damaged_stage_falls_back_to_its_last_checkpoint_and_says_so(
    run: Path, finished: tuple[Path, Any], steps: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(runs.logger, "warning", said.append)
    state = run / "stage-2" / "trainer_state.json"
    state.write_text(state.read_text().replace('"global_step": 3', '"global_step": 2'))
    shutil.rmtree(run / "stage-2" / "checkpoint-3")
    trainer(run, **OPTIONS).train(resume_from_checkpoint=True)
    assert any("stage-2 is damaged (trainer_state.json is not what was saved)" in line for line in said)
    assert steps == [(2, 3)]
    assert_same(finished[1], saved(run))


def test_fewer_stages_that_are_done_are_what_the_run_folder_then_holds(run: Path, steps: list[Any]) -> None:
    trainer(run, **OPTIONS, stages_to_train=[0, 1]).train(resume_from_checkpoint=True)
    assert steps == [] and read_values(run) == read_values(run / "stage-1")


# ---- what is not trained over ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["empty", "other files", "stage folder", "checkpoint elsewhere", "other stage"])
def test_a_place_without_anything_to_resume_from_is_refused(
    run: Path, tmp_path: Path, what: str, steps: list[Any]
) -> None:
    """Or else training would begin anew, over the finished run in output_dir."""
    place, options = tmp_path / "place", dict(OPTIONS)
    place.mkdir()
    if what == "other files":
        (place / "notes.txt").write_text("mine")
        (place / "stage-0").mkdir()
    elif what == "stage folder":
        place = run / "stage-2"
    elif what == "checkpoint elsewhere":
        place = Path(shutil.copytree(run / "stage-0" / "checkpoint-2", place / "checkpoint-2"))
    elif what == "other stage":
        place, options["stages_to_train"] = run / "stage-2" / "checkpoint-2", [0, 1]
    before = contents(run)
    with pytest.raises(MLFSError, match=r"give (a run folder|RUN/stage-S)") as raised:
        trainer(run, **options).train(resume_from_checkpoint=str(place))
    assert "\n" not in str(raised.value)
    assert contents(run) == before and steps == []


@pytest.mark.parametrize("resume", ["checkpoint of it", "another run", "nothing"])
def test_a_finished_run_is_not_trained_over_unless_asked(
    run: Path, finished: tuple[Path, Any], tmp_path: Path, resume: str, steps: list[Any]
) -> None:
    given: str | bool = {
        "checkpoint of it": str(run / "stage-1" / "checkpoint-2"),
        "another run": str(tmp_path / "other"),
        "nothing": False,
    }[resume]
    if resume == "another run":
        shutil.copytree(run, tmp_path / "other")
        shutil.rmtree(tmp_path / "other" / "stage-2")
    before = contents(run)
    with pytest.raises(MLFSError, match=r"holds .*overwrite_run=True") as raised:
        trainer(run, **OPTIONS).train(resume_from_checkpoint=given)
    assert "\n" not in str(raised.value) and contents(run) == before and steps == []
    trainer(run, **OPTIONS, overwrite_run=True).train(resume_from_checkpoint=given)
    expected = {"checkpoint of it": (1, 3), "another run": (2, 1), "nothing": (0, 1)}
    assert steps[0] == expected[resume] and steps[-1] == (2, 3)  # the later stages train anew
    assert read_values(run) == read_values(run / "stage-2")
    assert_same(finished[1], saved(run))


def test_later_checkpoints_are_not_trained_over_unless_asked(run: Path, steps: list[Any]) -> None:
    for stage in (1, 2):
        shutil.rmtree(run / f"stage-{stage}")
    (run / "stage-0" / "mlfs.json").unlink()
    given, later = run / "stage-0" / "checkpoint-2", run / "stage-0" / "checkpoint-3"
    with pytest.raises(MLFSError, match=r"holds what was trained after .*checkpoint-2 \(stage-0/checkpoint-3\)"):
        trainer(run, **OPTIONS).train(resume_from_checkpoint=str(given))
    (later / "optimizer.pt").unlink()  # no longer anything to lose
    trainer(run, **OPTIONS, stages_to_train=[0]).train(resume_from_checkpoint=str(given))
    assert steps == [(0, 3)]


def test_a_saved_super_transformer_in_output_dir_is_not_trained_over_unless_asked(run: Path, tmp_path: Path) -> None:
    for stage in range(3):
        shutil.rmtree(run / f"stage-{stage}")
    before = contents(run)
    with pytest.raises(MLFSError, match=r"holds a run already \(mlfs\.json\)"):
        trainer(run, **OPTIONS).train()
    assert contents(run) == before


def test_results_of_an_earlier_training_are_gone_once_training_begins(run: Path) -> None:
    for name in ("results.json", "data.json"):
        (run / name).write_text("{}")
    shutil.rmtree(run / "stage-2")
    trainer(run, **OPTIONS).train(resume_from_checkpoint=True)
    assert not (run / "results.json").exists() and (run / "data.json").exists()
    (run / "results.json").write_text("{}")
    trainer(run, **OPTIONS).train(resume_from_checkpoint=True)  # there is nothing left to train
    assert (run / "results.json").exists()
    trainer(run, **OPTIONS, overwrite_run=True).train()
    assert not (run / "results.json").exists() and not (run / "data.json").exists()


def test_a_run_folder_in_which_another_trains_is_refused(run: Path, steps: list[Any]) -> None:
    """Of two trainings in one folder the second ends at once; the first is not disturbed."""
    begun, end, refused = threading.Event(), threading.Event(), []

    def first() -> None:
        with locked_folder(run):
            begun.set()
            end.wait(60)

    thread = threading.Thread(target=first)
    thread.start()
    begun.wait(60)
    before = contents(run)
    for options in ({}, {"overwrite_run": True}):
        for resume in (True, False):
            with pytest.raises(MLFSError, match="another process writes to") as raised:
                trainer(run, **OPTIONS, **options).train(resume_from_checkpoint=resume)
            refused.append(str(raised.value))
    end.set()
    thread.join()
    assert contents(run) == before and steps == [] and all("\n" not in line for line in refused)


def test_a_stage_that_was_cut_off_at_its_end_takes_no_further_step(
    run: Path, finished: tuple[Path, Any], steps: list[Any]
) -> None:
    """transformers takes a step before it asks whether there is another to take."""
    for stage in (1, 2):
        shutil.rmtree(run / f"stage-{stage}")
    (run / "stage-0" / "mlfs.json").unlink()
    trainer(run, **OPTIONS, stages_to_train=[0]).train(resume_from_checkpoint=True)
    assert steps == []
    assert_same(saved(finished[0] / "stage-0"), saved(run / "stage-0"))
    assert read_values(run / "stage-0") == read_values(finished[0] / "stage-0")  # what labels told of the task too


def test_a_stage_that_a_callback_ended_and_that_was_cut_off_then_takes_no_further_step(
    tmp_path: Path, steps: list[Any]
) -> None:
    class StopsAtTwo(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            control.should_training_stop |= state.global_step == 2

    options = {**OPTIONS, "stages_to_train": [0], "stage_steps": [6]}
    trainer(tmp_path, **options, callbacks=[StopsAtTwo()]).train()
    before = saved(tmp_path / "stage-0")
    assert [step for _, step in steps] == [1, 2]
    (tmp_path / "stage-0" / "mlfs.json").unlink()
    trainer(tmp_path, **options, callbacks=[StopsAtTwo()]).train(resume_from_checkpoint=True)
    assert [step for _, step in steps] == [1, 2]
    assert_same(before, saved(tmp_path / "stage-0"))


def test_a_stage_may_go_on_for_more_steps_than_it_began_with(run: Path, steps: list[Any]) -> None:
    for stage in (1, 2):
        shutil.rmtree(run / f"stage-{stage}")
    (run / "stage-0" / "mlfs.json").unlink()
    options = {**OPTIONS, "stages_to_train": [0], "stage_steps": [5]}
    trainer(run, **options).train(resume_from_checkpoint=True)
    assert steps == [(0, 4), (0, 5)]


def test_temporary_files_of_a_process_that_was_killed_are_removed(run: Path) -> None:
    names = (".tmp-a1.json", "stage-1/.tmpB2", "stage-2/checkpoint-2/.tmp-c3.safetensors")
    for name in names:
        (run / name).write_text("half")
    (run / "notes.tmp").write_text("mine")
    trainer(run, **OPTIONS).train(resume_from_checkpoint=True)
    assert not any((run / name).exists() for name in names) and (run / "notes.tmp").exists()
