"""The list of a folder's files with their hashes, written last: by it a checkpoint is known to be whole.

`files.json` holds {"files": {name: {"bytes": ..., "sha256": ...}}, "checksum": ...}. Every file is on the disk before
the list is written, so a folder that has its list had all of it, also after a power cut.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from mlfs.files import checksum, hash_file, read_json, sync, write_json

LIST_NAME = "files.json"
_ELSEWHERE = ("data.json", "results.json", "log_history.json")  # written at other times
# What resuming reads where it is there, so that a file without an entry must not be.
_READ = ("optimizer*", "scheduler.pt", "scaler.pt", "rng_state*.pth", "projections.safetensors")


def write_list(folder: Path) -> None:
    """Puts every file of `folder` on the disk, then writes their list. Raises OSError where the disk refuses."""
    entries = {}
    for path in sorted(_files(folder)):
        sync(path)
        entries[path.relative_to(folder).as_posix()] = {"bytes": path.stat().st_size, "sha256": hash_file(path)}
    for inner in {(folder / name).parent for name in entries}:
        sync(inner)
    sync(folder.parent)
    values: dict[str, Any] = {"files": entries}
    values["checksum"] = checksum(values)
    write_json(folder / LIST_NAME, values)


def what_is_wrong(folder: Path, patterns: tuple[str, ...] = ("*",)) -> str | None:
    """Compares a folder with its list.

    Args:
        patterns: of the names to look at; by default all.

    Returns:
        What differs, in some words; None if every listed file is as it was saved.
    """
    entries = listed(folder)
    if isinstance(entries, str):
        return entries
    for name, entry in entries.items():
        path = folder / name
        if not any(Path(name).match(pattern) for pattern in patterns):
            continue
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != entry["bytes"] or hash_file(path) != entry["sha256"]:
            return f"{name} is not what was saved"
    for path in _files(folder):
        name = path.relative_to(folder).as_posix()
        if name not in entries and any(path.match(pattern) for pattern in _READ):
            return f"{name} was not saved with it"
    return None


def listed(folder: Path) -> Mapping[str, Mapping[str, Any]] | str:
    """Reads the list: bytes and SHA-256 of each file, by name; or says, in some words, why it cannot be read."""
    try:
        values = read_json(folder / LIST_NAME)
        if values.pop("checksum") != checksum(values):
            return f"{LIST_NAME} is not what was saved"
        return values["files"]  # type: ignore[no-any-return]
    except FileNotFoundError:
        return f"it has no {LIST_NAME}, which is written last"
    except (OSError, ValueError, AttributeError, LookupError, TypeError, RecursionError):
        return f"{LIST_NAME} cannot be read"


def _files(folder: Path) -> Iterator[Path]:
    """Yields the files of a folder and of folders in it, but for the list, hidden ones, and checkpoints and stages,
    which have lists of their own."""
    for path in folder.iterdir():
        if path.name.startswith("."):
            continue
        if path.is_dir():
            if not path.name.startswith((f"{PREFIX_CHECKPOINT_DIR}-", "stage-")):
                yield from _files(path)
        elif path.name != LIST_NAME and path.name not in _ELSEWHERE:
            yield path
