"""What a training run leaves on disk, and which of it is whole."""

import json
from collections.abc import Sequence
from pathlib import Path

from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging

from mlfs.errors import MLFSError
from mlfs.supernet.checkpoint import CONFIG_NAME, read_values

logger = logging.get_logger("transformers.mlfs")


def stage_folder(run: Path, stage: int) -> Path:
    """Returns where a run keeps a stage: its checkpoints, and the super-transformer once the stage is done."""
    return run / f"stage-{stage}"


def resume_point(run: Path, stages: Sequence[int], resume: str | bool | None) -> tuple[Path, Path | None]:
    """Finds where a run goes on.

    Args:
        run: the run folder of the arguments.
        stages: that are to train.
        resume: whether to go on in `run`; or the path of another run folder, or of one checkpoint in it.

    Returns:
        The run folder to go on in, and the newest whole checkpoint of its first unfinished stage; None for none.

    Raises:
        MLFSError: a path without a folder, or a checkpoint that is half-written.
    """
    if not resume:
        return run, None
    if isinstance(resume, str):
        given = Path(resume)
        if not given.is_dir():
            raise MLFSError(f"resume_from_checkpoint={resume}: no such folder; give a run folder or a checkpoint in it")
        if given.name.startswith(PREFIX_CHECKPOINT_DIR):
            if not is_whole(given):
                raise MLFSError(f"checkpoint {given} is half-written: resume from the run folder, it finds a whole one")
            return given.parent.parent, given
        run = given
    for stage in stages:
        folder = stage_folder(run, stage)
        if not is_saved(folder):
            return run, last_checkpoint(folder)
    return run, None


def last_checkpoint(folder: Path) -> Path | None:
    """Finds the newest checkpoint of a stage that was written whole; None if there is none."""
    found: list[tuple[int, Path]] = []
    for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        number = path.name.rpartition("-")[2]
        if number.isdigit():
            found.append((int(number), path))
    for _, path in sorted(found, reverse=True):
        if is_whole(path):
            return path
        logger.warning(f"{path} is half-written and is passed over.")
    return None


def is_whole(checkpoint: Path) -> bool:
    """Whether everything was written: the Trainer writes its state last."""
    try:
        json.loads((checkpoint / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
        return (checkpoint / read_values(checkpoint)["tensors"]["file"]).is_file()
    except (OSError, ValueError, MLFSError):
        return False


def is_saved(stage_folder: Path) -> bool:
    """Whether the stage ran to its end: the super-transformer is saved in its folder."""
    return (stage_folder / CONFIG_NAME).is_file() and (stage_folder / TRAINER_STATE_NAME).is_file()
