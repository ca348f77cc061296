"""Folders that can be written, that one process at a time writes to, and that hold a run."""

import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from mlfs.errors import MLFSError
from mlfs.files import shortened, temporary_file
from mlfs.supernet.checkpoint import CONFIG_NAME

LOCK_NAME = ".mlfs.lock"
_held: set[tuple[Path, int]] = set()  # folders that this process has locked, each with the thread that did


def make_folder(folder: Path) -> None:
    """Makes a folder that can be written, if it is not there.

    Raises:
        MLFSError: a file has its name, or the system refuses.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with temporary_file(folder, ".test"):
            pass
    except (FileExistsError, NotADirectoryError):
        raise MLFSError(f"{folder} is a file, or lies below one: give a folder") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise MLFSError(f"{shortened(folder)} cannot be written: {reason}; give another folder") from None


@contextlib.contextmanager
def locked_folder(folder: Path) -> Iterator[None]:
    """Keeps all other processes out of the block that name the same folder; blocks of one thread nest.

    The system holds the lock, and drops it with the process, however that ends. The folder is made if it is not there.

    Raises:
        MLFSError: another process, or another thread, is in the block; or the folder cannot be written.
    """
    make_folder(folder)
    key = (folder.resolve(), threading.get_ident())
    if key in _held:
        yield
        return
    lock = FileLock(key[0] / LOCK_NAME, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise MLFSError(
            f"another process writes to {folder}: wait until it is done, stop it, or give another folder"
        ) from None
    except (OSError, NotImplementedError) as error:
        raise MLFSError(f"{folder} cannot be locked: {error}; give a folder on another file system") from None
    _held.add(key)
    try:
        yield
    finally:
        _held.discard(key)
        lock.release()


def run_around(folder: Path) -> Path | None:
    """Finds the run that `folder` is or lies in: the outermost folder there with a saved super-transformer; or None."""
    place = folder.resolve()
    found = None
    for candidate in (place, *place.parents):
        if (candidate / CONFIG_NAME).is_file():
            found = candidate
    return found


def run_within(folder: Path) -> Path | None:
    """Finds a run that `folder` contains at any depth; or None."""
    return next((path.parent for path in folder.resolve().rglob(CONFIG_NAME)), None)
