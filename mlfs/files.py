"""Writes files that are whole or not there: under a temporary name first, then renamed."""

import contextlib
import hashlib
import json
import os
import re
import tempfile
from collections.abc import Iterator
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


def move_into_place(temporary: str, path: Path) -> None:
    """Renames a finished temporary file to `path`, in place of what is there, with an ordinary file's permissions.

    Only now are they certain: a writer that makes the file anew, as safetensors does, leaves it to its owner alone.
    """
    mask = os.umask(0)  # the only way to read it is to set it
    os.umask(mask)
    os.chmod(temporary, 0o666 & ~mask)
    os.replace(temporary, path)


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
