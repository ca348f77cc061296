"""Writes files that are whole or not there: under a temporary name first, then renamed."""

import contextlib
import errno
import hashlib
import json
import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any


def write_json(path: Path, value: Any) -> None:
    """Writes `value` as a JSON file, which no reader ever sees half-written. Lists of numbers take one line each.

    Raises:
        OSError: the folder does not exist or cannot be written.
        TypeError: JSON cannot state the value.
    """
    with temporary_file(path.parent, ".json") as temporary:
        text = json.dumps(value, indent=1, separators=(",", ": "))
        Path(temporary).write_text(_short_lists(text) + "\n", encoding="utf-8")
        move_into_place(temporary, path)


def read_json(path: Path) -> Any:
    """Reads a JSON file.

    Raises:
        OSError: it cannot be read.
        ValueError: it is not JSON, or is nested deeper than Python reads.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except RecursionError:
        raise ValueError("it is nested too deep") from None


def move_into_place(temporary: str, path: Path) -> None:
    """Renames a finished temporary file to `path`, in place of what is there, with an ordinary file's permissions.

    Only now are they certain: a writer that makes the file anew, as safetensors does, leaves it to its owner alone.
    Its content is on the disk before its name is, so that a power cut leaves the old file or the new one too.
    """
    mask = os.umask(0)  # the only way to read it is to set it
    os.umask(mask)
    os.chmod(temporary, 0o666 & ~mask)
    sync(temporary)
    os.replace(temporary, path)
    sync(path.parent)


def sync(path: str | Path) -> None:
    """Waits until a file's content, or a folder's list of names, is on the disk."""
    if os.name == "nt" and os.path.isdir(path):
        return  # Windows opens no folders
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # a file system that cannot say
            raise
    finally:
        os.close(handle)


def checksum(values: Mapping[str, Any]) -> str:
    """Hashes what a JSON object says, however it is laid out: SHA-256, in hex digits."""
    plain = json.loads(json.dumps(values))  # whose keys are all strings
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


def shortened(path: str | Path, most: int = 100) -> str:
    """Returns a path for a message: its beginning and its end, if it is long."""
    text = str(path)
    return text if len(text) <= most else f"{text[: most // 2]}...{text[-most // 4 :]}"


def hash_file(path: str | Path) -> str:
    """Returns the SHA-256 of a file's bytes, as 64 hex digits."""
    sha = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            sha.update(block)
    return sha.hexdigest()


@contextlib.contextmanager
def temporary_file(folder: Path, suffix: str) -> Iterator[str]:
    """Yields the name of a new, empty file in `folder`; unless it was moved into place, it goes with the block."""
    handle, name = tempfile.mkstemp(prefix=".tmp-", suffix=suffix, dir=folder)
    os.close(handle)
    try:
        yield name
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name)


def _short_lists(text: str) -> str:
    """Puts lists of numbers on one line each, so that the file stays readable."""
    return re.sub(r"\[[^\[\]{}]*\]", lambda match: re.sub(r"\s+", " ", match.group()), text)
