"""What a training run leaves on disk, and which of it is whole."""

import json
from pathlib import Path

from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging

from mlfs.errors import MLFSError
from mlfs.supernet.checkpoint import CONFIG_NAME, read_values

logger = logging.get_logger("transformers.mlfs")


def last_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint of a stage that was written whole; None if there is none."""
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
