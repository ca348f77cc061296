"""Reads local files and Hub data sets into `datasets.Dataset`; every failure is one line."""

from __future__ import annotations

import csv
import errno
import glob
import itertools
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pandas as pd
from datasets import Dataset, Features, Value, load_dataset, load_dataset_builder
from datasets import logging as datasets_logging

from mlfs.data.arguments import DataArguments
from mlfs.data.columns import GLUE_TEXTS
from mlfs.errors import MLFSError

# The reader of each extension; source files are read as texts, too.
READERS = {
    ".csv": "csv",
    ".tsv": "tsv",
    ".json": "json",
    ".jsonl": "json",
    ".ndjson": "json",
    ".parquet": "parquet",
    ".txt": "text",
    ".text": "text",
}
_SOURCES = """
.py .pyi .c .h .cc .cpp .cxx .hpp .cu .cuh .java .js .mjs .jsx .ts .tsx .go .rs .rb .php .cs .kt .swift .scala .sh .jl
.r .lua .pl .sql .hs .ml .f90 .m .html .css .md .rst .tex
"""
SOURCE_SUFFIXES = frozenset(_SOURCES.split())
_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.EEXIST, errno.ENOTDIR)
MAX_COLUMNS = 20_000  # `datasets` takes 0.4 ms for each
SEPARATORS = {",": "commas", "\t": "tabs", ";": "semicolons", "|": "bars"}
VALIDATION_SPLITS = ("validation", "validation_matched", "dev")


def read_hub(args: DataArguments, name: str) -> tuple[Dataset, Dataset | None]:
    """Reads the training and validation splits of the Hub data set `name`, or of a local folder laid out like one.

    Returns:
        `(train, validation)`; validation is None if `args` names no split for it and none has a usual name.

    Raises:
        MLFSError: the data set, its configuration or a split cannot be read.
    """
    if name.split("/")[-1] == "glue" and args.dataset_config_name is None:
        raise MLFSError(f"{name} holds several tasks; give --dataset_config_name, one of {', '.join(GLUE_TEXTS)}")

    def load(split: str | None) -> Any:
        what = f"data set {name}{f'[{split}]' if split else ''}"
        with reading(what, "check its name, configuration and split and the connection, or give --train_file"):
            return load_dataset(name, args.dataset_config_name, split=split, cache_dir=args.data_cache)

    whole = load(None)
    train = whole[args.train_split] if args.train_split in whole else load(args.train_split)
    split = args.validation_split or next((s for s in VALIDATION_SPLITS if s in whole), None)
    if split is None:
        return train, None
    return train, whole[split] if split in whole else load(split)


def read_files(pattern: str, option: str, args: DataArguments) -> Dataset:
    """Reads the rows of a file, a folder or a glob pattern.

    CSV and TSV give string columns only (an empty field is None); text and source files give a column `text`.

    Args:
        option: the argument that names the pattern, for messages.

    Raises:
        MLFSError: no such file, files of several kinds or of an unknown one, no rows, or a file that cannot be read.
    """
    paths = _expand(pattern, option)
    kinds = {_kind(path, option) for path in paths}
    documents = kinds <= {"text", "source"}
    if len(kinds) > 1 and not documents:
        raise MLFSError(
            f"--{option} {pattern} matches files of several kinds ({', '.join(sorted(kinds))}); give one kind"
        )
    reader = "text" if documents else min(kinds)
    options: dict[str, Any] = {}
    if documents:
        lines = args.documents == "line" or (args.documents == "auto" and kinds == {"text"})
        # In a folder some file may be in another encoding: one bad byte there should not end the run.
        errors = "strict" if len(paths) == 1 else "replace"
        options = {"sample_by": "line" if lines else "document", "encoding_errors": errors}
    with reading(f"--{option} {pattern}", f"expected {reader.upper()} in UTF-8: repair the file, or give another"):
        if reader in ("csv", "tsv"):
            # Everything is read as strings, and only an empty field is a missing value: with inferred types a text
            # "NA" would be missing, and a column could change its type between two chunks of the file.
            dialect = {"sep": "\t", "quoting": csv.QUOTE_NONE} if reader == "tsv" else {"sep": ","}
            features = Features({column: Value("string") for column in _header(paths, dialect)})
            options = {**dialect, "features": features, "keep_default_na": False, "na_values": [""]}
            reader = "csv"
        files = [glob.escape(str(path.resolve())) for path in paths]
        builder = load_dataset_builder(reader, data_files=files, cache_dir=args.data_cache, **options)
        builder.download_and_prepare()
        # `datasets` cannot open what holds nothing.
        count = builder.info.splits["train"].num_examples
        rows = builder.as_dataset(split="train") if count else None
    if rows is None:
        raise MLFSError(f"--{option} {pattern} has no rows; give data with at least one row below the header")
    return rows


@contextmanager
def reading(what: str, advice: str) -> Iterator[None]:
    """Turns whatever a reader raises inside the block into an MLFSError of one line.

    The reader's own log of the same error is kept quiet.

    Args:
        what: what is read. advice: what to do if it cannot be.
    """
    verbosity = datasets_logging.get_verbosity()
    datasets_logging.set_verbosity(datasets_logging.CRITICAL)
    try:
        yield
    except Exception as error:
        root: BaseException = error
        while root.__cause__ is not None:
            root = root.__cause__
        reason = " ".join(str(root).split()) or type(root).__name__
        if isinstance(root, OSError) and root.errno in _DISK_ERRORS:
            advice = "make room or permit it, or put the cache elsewhere with --data_cache"
        raise MLFSError(f"{what} cannot be read: {reason}; {advice}") from error
    finally:
        datasets_logging.set_verbosity(verbosity)


def _expand(pattern: str, option: str) -> list[Path]:
    """Lists the non-empty files that a path, a folder or a glob pattern stands for, in a fixed order."""
    path = Path(pattern).expanduser()
    if path.is_dir():
        paths = [p for p in path.rglob("*") if _is_text(p) and not _is_hidden(p.relative_to(path))]
    elif path.exists():
        paths = [path]
    else:
        paths = [Path(p) for p in glob.glob(str(path), recursive=True)]
    paths = sorted(p for p in paths if p.is_file())
    if not paths and path.is_dir():
        raise MLFSError(f"--{option} {pattern} is a folder without source or text files; give a file, or a pattern")
    if not paths:
        raise MLFSError(f"--{option} {pattern} does not exist; give a file, a folder or a pattern, from {Path.cwd()}")
    filled = [p for p in paths if p.stat().st_size]
    if not filled:
        raise MLFSError(f"--{option} {pattern} is empty; give a file that holds data")
    return filled


def _is_text(path: Path) -> bool:
    suffix = path.suffix.lower()
    return suffix in SOURCE_SUFFIXES or READERS.get(suffix) == "text"


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _kind(path: Path, option: str) -> str:
    """Returns the reader of a file's extension, or "source"."""
    suffix = path.suffix.lower()
    if suffix not in READERS and suffix not in SOURCE_SUFFIXES:
        known = f"{', '.join(READERS)} and source files such as .py"
        raise MLFSError(f"--{option} {path} has the unknown extension {suffix!r}; known are {known}")
    return READERS.get(suffix, "source")


def _header(paths: list[Path], dialect: dict[str, Any]) -> list[str]:
    """Returns the column names that the files share; ValueError if they differ, or if a name occurs twice."""
    columns: list[str] = []
    for path in paths:
        # pandas takes the first row as the number of columns and refuses a longer second one. Left to read the whole
        # file it would take the surplus first column for row names and shift all the others.
        head = pd.read_csv(path, header=None, nrows=2, dtype=str, keep_default_na=False, encoding="utf-8", **dialect)
        names = [str(name) for name in head.iloc[0]]
        if len(names) > MAX_COLUMNS:
            raise ValueError(
                f"{path.name} has {len(names):,} columns, and {MAX_COLUMNS:,} are read at most: keep those of text and "
                "label"
            )
        double, times = Counter(names).most_common(1)[0]
        if times > 1:
            raise ValueError(f"the header of {path.name} names {double!r} more than once")
        _check_separator(path, names, dialect["sep"])
        if columns and names != columns:
            raise ValueError(f"the header of {path.name} differs from that of {paths[0].name}")
        columns = names
    return columns


def _check_separator(path: Path, names: list[str], separator: str) -> None:
    """Raises ValueError if a file's one column looks like several with another separator between.

    A spreadsheet where the comma is the decimal sign writes semicolons: read as one column, labels and texts together
    would pass for text to train a decoder on.
    """
    others = [other for other in SEPARATORS if other != separator and other in names[0]]
    if len(names) > 1 or not others:
        return
    other = others[0]
    with open(path, encoding="utf-8", newline="") as file:
        rows = csv.reader(itertools.islice(file, 100), delimiter=other)
        counts = {len(row) for row in rows if row}
    if len(counts) == 1:
        count, sign = counts.pop(), SEPARATORS[other]
        raise ValueError(
            f"{path.name} has one column with {SEPARATORS[separator]} between columns, and {count} with {sign}; "
            f"write it with {SEPARATORS[separator]}, or change its extension"
        )
