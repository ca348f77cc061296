"""What a training run leaves on disk, which of it is whole, and what may be written over."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging

from mlfs.errors import MLFSError
from mlfs.files import move_into_place, read_json, temporary_file
from mlfs.supernet.checkpoint import CONFIG_NAME, read_state, read_values
from mlfs.training.file_list import LIST_NAME, what_is_wrong, write_list

logger = logging.get_logger("transformers.mlfs")
DATA_NAME, RESULTS_NAME, LOGS_NAME = "data.json", "results.json", "log_history.json"


class ResumePoint(NamedTuple):
    """Says where a run goes on.

    Attributes:
        run: the run folder that is read.
        checkpoint: to go on from, in the first stage that trains; None to begin that stage anew.
    """

    run: Path
    checkpoint: Path | None


def stage_folder(run: Path, stage: int) -> Path:
    """Returns where a run keeps a stage: its checkpoints, and the super-transformer once the stage is done."""
    return run / f"stage-{stage}"


def resume_point(run: Path, stages: Sequence[int], resume: str | bool | None) -> ResumePoint:
    """Finds where a run goes on: after the last stage that is done, at its newest whole checkpoint.

    A stage holds what the stages before it have learned, so that their folders need not be there any more.

    Args:
        run: the run folder of the arguments.
        stages: that are to train.
        resume: whether to go on in `run`; or the path of another run folder, or of one checkpoint in it.

    Raises:
        MLFSError: a path without a folder, without anything to go on from, or of a checkpoint that is not whole.
    """
    if not resume:
        return ResumePoint(run, None)
    if isinstance(resume, str):
        given = Path(resume)
        if not given.is_dir():
            raise MLFSError(f"resume_from_checkpoint={resume}: no such folder; give a run folder or a checkpoint in it")
        if given.name.startswith(f"{PREFIX_CHECKPOINT_DIR}-"):
            return _at_checkpoint(given, stages)
        run = given
    for stage in reversed(stages):
        folder = stage_folder(run, stage)
        if is_saved(folder):
            return ResumePoint(run, None)
        if (checkpoint := last_checkpoint(folder)) is not None:
            return ResumePoint(run, checkpoint)
    if isinstance(resume, str):
        raise MLFSError(
            f"resume_from_checkpoint={resume}: no stage or checkpoint there is whole; give a run folder (the parent of "
            "stage-0), or a checkpoint in it, or leave it out to start anew"
        )
    return ResumePoint(run, None)


def stages_done(point: ResumePoint, stages: Sequence[int]) -> list[int]:
    """Lists which of `stages` do not train where a run goes on at `point`: those before its checkpoint, or up to the
    last that is done."""
    done: list[int] = []
    for i, stage in enumerate(stages):
        folder = stage_folder(point.run, stage)
        if point.checkpoint is not None and _same_folder(folder, point.checkpoint.parent):
            return list(stages[:i])
        if point.checkpoint is None and _is_done(folder):
            done = list(stages[: i + 1])
    return done


def _at_checkpoint(checkpoint: Path, stages: Sequence[int]) -> ResumePoint:
    """Goes on from a checkpoint that was named."""
    checkpoint = checkpoint.absolute()
    if (wrong := what_is_wrong(checkpoint)) is not None:
        raise MLFSError(
            f"checkpoint {checkpoint} is half-written or damaged ({wrong}): resume from the run folder, it finds a "
            "whole one"
        )
    run = checkpoint.parent.parent
    if any(stage_folder(run, stage) == checkpoint.parent for stage in stages):
        return ResumePoint(run, checkpoint)
    raise MLFSError(
        f"checkpoint {checkpoint} is of none of the stages {list(stages)}: give RUN/stage-S/{checkpoint.name}, where S "
        "is one of stages_to_train"
    )


def make_room(
    run: Path, stages: Sequence[int], point: ResumePoint, *, resumes: bool, overwrite: bool, delete: bool
) -> None:
    """Refuses to train over an earlier run in `run`, or deletes what of it training replaces.

    Args:
        run: where the run is written.
        stages: that train.
        point: where training goes on.
        resumes: whether an earlier run goes on. In its own folder only what is whole counts: there is no work to lose
            in the rest.
        overwrite: whether what is there may be deleted.
        delete: whether this process deletes; else it only looks.

    Raises:
        MLFSError: there are stages or checkpoints that training would replace, and `overwrite` is not set.
    """
    if not stages:
        return
    goes_on = resumes and _same_folder(point.run, run)
    replaced: list[Path] = []
    for stage in stages:
        folder = stage_folder(run, stage)
        if goes_on and point.checkpoint is not None and _same_folder(folder, point.checkpoint.parent):
            replaced += [*_later_checkpoints(point.checkpoint), folder / CONFIG_NAME]
        elif folder.exists():
            replaced.append(folder)
    if goes_on:
        replaced = [path for path in replaced if _holds_work(path)]
    elif not replaced and not any(stage_folder(run, stage).exists() for stage in range(stages[0])):
        replaced = [path for path in (run / CONFIG_NAME,) if path.exists()]
    if replaced and not overwrite:
        what = f"what was trained after {point.checkpoint}" if goes_on else "a run already"
        raise MLFSError(
            f"{run} holds {what} ({replaced[0].relative_to(run)}): go on with resume_from_checkpoint=True, "
            "choose another output_dir, or delete it with overwrite_run=True"
        )
    if delete:
        # what makes a run of the folder goes first, what tells whose run it was last
        first = [LIST_NAME, CONFIG_NAME] if replaced else []
        last = [LOGS_NAME, DATA_NAME] if replaced else []
        for path in (*(run / name for name in (*first, RESULTS_NAME)), *replaced, *(run / name for name in last)):
            _delete(path)


def remove_leftovers(run: Path) -> None:
    """Deletes the temporary files of processes that were cut off; for whoever holds the lock of the run folder."""
    # .tmp-... are those of mlfs.files, .tmp... those of safetensors
    for pattern in (".tmp*", "stage-*/.tmp*", "stage-*/checkpoint-*/.tmp*", "stage-*/.teacher/.tmp*"):
        for path in run.glob(pattern):
            if path.is_file():
                path.unlink(missing_ok=True)


def _delete(path: Path) -> None:
    """Deletes a file or a folder, if it is there; a folder's lists first, without which nothing in it is taken for
    whole."""
    if not path.is_dir():
        path.unlink(missing_ok=True)
        return
    for name in (LIST_NAME, CONFIG_NAME):
        (path / name).unlink(missing_ok=True)
    shutil.rmtree(path)


def _same_folder(one: Path, other: Path) -> bool:
    """Tells whether two paths name one folder."""
    return one.resolve() == other.resolve()


def last_checkpoint(folder: Path) -> Path | None:
    """Finds the newest checkpoint of a stage that was written whole, and says which it passes over; None for none."""
    for _, path in sorted(_checkpoints(folder), reverse=True):
        if (wrong := what_is_wrong(path)) is None:
            return path
        logger.warning(f"{path} is half-written or damaged ({wrong}) and is passed over.")
    return None


def is_whole(checkpoint: Path) -> bool:
    """Whether everything was written, and is as it was: the list of the files comes last."""
    return what_is_wrong(checkpoint) is None


def was_stopped(checkpoint: Path) -> bool:
    """Tells whether a callback, such as early stopping, had ended the stage before its last step at a checkpoint."""
    state = read_json(checkpoint / TRAINER_STATE_NAME)
    control = state.get("stateful_callbacks", {}).get("TrainerControl", {}).get("args", {})
    return bool(control.get("should_training_stop")) and state["global_step"] < state["max_steps"]


def same_state(one: Path, other: Path) -> bool:
    """Tells whether two folders hold the same saved super-transformer, both whole."""
    try:
        return read_values(one) == read_values(other) and what_is_wrong(other) is None
    except MLFSError:
        return False


def copy_state(stage_folder: Path, run: Path) -> None:
    """Copies what a stage ended with to the run folder; `mlfs.json` comes last, so that the run is whole all along."""
    names = sorted(path.name for path in stage_folder.iterdir() if path.is_file() and not path.name.startswith("."))
    names = [name for name in names if name not in (CONFIG_NAME, LIST_NAME, TRAINER_STATE_NAME)]
    run.mkdir(parents=True, exist_ok=True)
    for name in (*names, CONFIG_NAME):
        with temporary_file(run, Path(name).suffix) as temporary:
            shutil.copyfile(stage_folder / name, temporary)
            move_into_place(temporary, run / name)
    for stale in run.glob("stages-????????.safetensors"):
        if stale.name not in names:
            stale.unlink(missing_ok=True)
    write_list(run)


def is_saved(stage_folder: Path) -> bool:
    """Whether the stage ran to its end, and what it ended with is whole; says so where it is damaged."""
    if not (stage_folder / CONFIG_NAME).is_file() or not (stage_folder / TRAINER_STATE_NAME).is_file():
        return False
    wrong = _damage(stage_folder)
    if wrong is not None:
        logger.warning(f"{stage_folder} is damaged ({wrong}) and is passed over.")
    return wrong is None


def _is_done(stage_folder: Path) -> bool:
    """Whether the stage ran to its end and is whole, without a word."""
    needed = (CONFIG_NAME, TRAINER_STATE_NAME)
    return all((stage_folder / name).is_file() for name in needed) and _damage(stage_folder) is None


def _damage(stage_folder: Path) -> str | None:
    """Says what is wrong with what a stage ended with; None if it is whole.

    A stage without a list was cut off between its last file and the list, or is of an earlier version: the tensors and
    `mlfs.json` have hashes of their own.
    """
    if (stage_folder / LIST_NAME).exists():
        return what_is_wrong(stage_folder)
    try:
        read_state(stage_folder)
        read_json(stage_folder / TRAINER_STATE_NAME)
    except (OSError, ValueError, MLFSError) as error:
        return str(error)
    return None


def _holds_work(path: Path) -> bool:
    """Whether there is work to lose in a stage's folder, in a checkpoint, or in what a stage ended with."""
    if path.name == CONFIG_NAME:
        return _is_done(path.parent)
    if path.name.startswith(f"{PREFIX_CHECKPOINT_DIR}-"):
        return is_whole(path)
    return _holds_work(path / CONFIG_NAME) or any(is_whole(checkpoint) for _, checkpoint in _checkpoints(path))


def _checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """Lists the checkpoints of a stage with their steps."""
    found: list[tuple[int, Path]] = []
    for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        number = path.name.rpartition("-")[2]
        if number.isdigit():
            found.append((int(number), path))
    return found


def _later_checkpoints(checkpoint: Path) -> list[Path]:
    """Lists the checkpoints of the same stage with more steps."""
    steps = int(checkpoint.name.rpartition("-")[2])
    return [path for number, path in sorted(_checkpoints(checkpoint.parent)) if number > steps]
