"""Small data files and data sets for the tests of `mlfs.data`, and how their errors are checked."""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from mlfs.data.arguments import DataArguments
from mlfs.data.raw import RawData, load_raw, prepare
from mlfs.errors import MLFSError


class Load:
    """Writes files and loads them, each under a name and with a cache of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.counter = folder, itertools.count()

    def write(self, name: str, content: str | bytes) -> str:
        """Writes a file in a folder of its own and returns its path."""
        path = self.folder / str(next(self.counter)) / name
        path.parent.mkdir()
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return str(path)

    def args(self, **options: Any) -> DataArguments:
        """Makes arguments with a cache for this test alone."""
        return DataArguments(data_cache=str(self.folder / "cache"), **options)

    def __call__(self, name: str, train: str | bytes, validation: str | bytes | None = None, **options: Any) -> RawData:
        options["train_file"] = self.write(name, train)
        if validation is not None:
            options["validation_file"] = self.write(name, validation)
        return load_raw(self.args(**options))


def one_line_error(call: Callable[[], Any], *parts: str) -> str:
    """Fails unless `call` raises an MLFSError of one line that holds every one of `parts`; returns the message."""
    with pytest.raises(MLFSError) as error:
        call()
    message = str(error.value)
    assert "\n" not in message
    for part in parts:
        assert part in message, message
    return message


def prepared(columns: dict[str, list], validation: dict[str, list] | None = None, **options: Any) -> RawData:
    """Prepares data sets that are given by their columns."""
    sets = [Dataset.from_dict(rows) if rows is not None else None for rows in (columns, validation)]
    return prepare(sets[0], sets[1], DataArguments(**options))
