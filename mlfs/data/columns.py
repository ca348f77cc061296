"""Finds which columns are text and label, and what the labels mean. The rules are stated in `mlfs.data.raw`."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from datasets import ClassLabel, Dataset, Features

from mlfs.data.arguments import DataArguments
from mlfs.errors import MLFSError

# Names that label columns have, beside "label"; in any case.
LABEL_NAMES = (
    "labels",
    "quality",
    "target",
    "class",
    "category",
    "score",
    "similarity",
    "similarity_score",
    "gold_label",
    "is_duplicate",
    "sentiment",
)
ID_NAMES = ("id", "idx", "index", "uid", "guid", "qid", "pairid", "promptid")
# What benchmarks call the text, or the two texts of a pair; the first that is there is taken.
KNOWN_TEXTS: tuple[tuple[str, ...], ...] = (
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question1", "question2"),
    ("question", "sentence"),
    ("#1 String", "#2 String"),
    ("text",),
    ("sentence",),
    ("content",),
    ("code",),
)
_PAIR = ("sentence1", "sentence2")
GLUE_TEXTS: dict[str, tuple[str, ...]] = {
    "cola": ("sentence",),
    "sst2": ("sentence",),
    "qqp": ("question1", "question2"),
    "qnli": ("question", "sentence"),
    **dict.fromkeys(("mrpc", "stsb", "rte", "wnli"), _PAIR),
    **dict.fromkeys(("mnli", "mnli_matched", "mnli_mismatched"), ("premise", "hypothesis")),
}
MAX_DIGITS = 300  # of a label; float64 ends at 309
MAX_FLOAT = 3.4028234663852886e38  # the largest float32, which labels of regression become
MAX_NAMED = 30  # columns that a message names
MAX_WHOLE_FLOATS = 20  # more distinct whole-numbered floats than that are measurements, not classes
_WHOLE = re.compile(r"[+-]?\d+")
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")


@dataclass(frozen=True)
class Part:
    """Holds one data set and what messages call it.

    Attributes:
        name: "train" or "validation".
        place: the name with its file or Hub data set, for messages.
        rows: the data set.
    """

    name: str
    place: str
    rows: Dataset

    @property
    def found(self) -> str:
        """The columns there are, for messages; of very many the first."""
        names = self.rows.column_names
        more = f" and {len(names) - MAX_NAMED:,} more" if len(names) > MAX_NAMED else ""
        return "its columns are " + ", ".join(map(repr, names[:MAX_NAMED])) + more

    @cached_property
    def features(self) -> Features:
        """The types of the columns. `Dataset.features` copies them all at each call: 40 ms for 2,000 columns."""
        return self.rows.features

    @cached_property
    def head(self) -> pa.Table:
        """The first thousand rows."""
        return self.rows.with_format("arrow")[: min(len(self.rows), 1000)]


def parts_of(train: Dataset | None, validation: Dataset | None, args: DataArguments) -> list[Part]:
    """Lists the data sets that are given, training first.

    Raises:
        MLFSError: none is given, or one has no rows.
    """
    hub = " ".join(filter(None, (args.dataset_name, args.dataset_config_name)))
    named = (("train", train, args.train_file), ("validation", validation, args.validation_file))
    parts = []
    for name, rows, file in named:
        if rows is None:
            continue
        source = hub or file
        parts.append(Part(name, f"{name} data ({source})" if source else f"{name} data", rows))
        if not len(rows):
            raise MLFSError(f"the {parts[-1].place} has no rows; give data with at least one row below the header")
    if not parts:
        raise MLFSError("no data to prepare; give a training set, a validation set or both")
    return parts


def glue_name(args: DataArguments) -> str | None:
    """Returns the GLUE task, such as "sst2", if the data is `glue` or `nyu-mll/glue` of the Hub; else None."""
    is_glue = args.dataset_name is not None and args.dataset_name.rstrip("/").split("/")[-1] == "glue"
    return args.dataset_config_name if is_glue else None


def find_columns(part: Part, args: DataArguments) -> tuple[str, tuple[str, ...], str | None]:
    """Finds the task, the text columns and the label column (None for causal-lm).

    The task may still be "auto": then it depends on the labels, whether it is classification or regression.

    Raises:
        MLFSError: a column that `args` names is missing, none can be guessed, or several can.
    """
    if args.text_pair_column and not args.text_column:
        raise MLFSError("--text_pair_column is given without --text_column; give both")
    given = tuple(column for column in (args.text_column, args.text_pair_column) if column)
    _require(part, given, args.label_column)
    glue = GLUE_TEXTS.get(glue_name(args) or "")
    task, label = args.task, None
    if task != "causal-lm":
        label = args.label_column or _guess_label(part, given)
    if label is None and task in ("classification", "regression"):
        raise MLFSError(
            f"no label column in the {part.place} (is the header missing?); {part.found}; give --label_column"
        )
    texts = given or glue or _guess_texts(part, label, 1 if task == "causal-lm" else 2)
    if label is None and task == "auto":
        if len(part.rows.column_names) > 1:
            advice = "give --label_column, or --task causal-lm"
            raise MLFSError(f"no label column in the {part.place} (is the header missing?); {part.found}; {advice}")
        task = "causal-lm"
    if task == "causal-lm" and len(texts) > 1:
        raise MLFSError("--text_pair_column is given, but causal-lm reads one text; leave it out")
    return task, texts, label


def check_columns(part: Part, texts: tuple[str, ...], label: str | None) -> None:
    """Raises MLFSError unless the columns are there, and the texts are strings of which none is missing."""
    _require(part, texts, label)
    rows = part.rows.select_columns(list(texts)).with_format("arrow")  # of all columns each is read at each question
    for column in texts:
        missing = pc.index(pc.is_null(rows[column][:]), True).as_py()
        if missing >= 0:
            raise MLFSError(f"row {missing + 1} of the {part.place} has no {column!r}; fill it in, or remove the row")
        if not _is_string(part, column):
            raise MLFSError(f"column {column!r} of the {part.place} is not text; {part.found}; give --text_column")


def read_labels(part: Part, column: str) -> list[Any]:
    """Returns the label of each row: numbers if all labels are numbers, also ones that a file spells out; else names.

    Raises:
        MLFSError: a label is missing, or is a value that no label can be, such as a list.
    """
    values = part.rows.select_columns([column])[column][:]
    feature = part.features[column]
    if isinstance(feature, ClassLabel):
        values = [None if v is None or v < 0 else feature.int2str(v) for v in values]
    values = [v.strip() if isinstance(v, str) else v for v in values]
    for row, value in enumerate(values, 1):
        if value is None or value == "" or (isinstance(value, float) and not math.isfinite(value)):
            raise MLFSError(f"row {row} of the {part.place} has no {column!r}; fill it in, or remove the row")
        if not isinstance(value, str | bool | int | float):
            raise MLFSError(
                f"column {column!r} of the {part.place} is no label: it holds {type(value).__name__} values"
            )
    if all(isinstance(v, str) and _NUMBER.fullmatch(v) for v in values):
        return [_number(v, f"row {row} of the {part.place}") for row, v in enumerate(values, 1)]
    return values


def _number(text: str, place: str) -> int | float:
    """Reads a label that spells a number; raises MLFSError for one that no float can hold, such as 1e400."""
    whole = _WHOLE.fullmatch(text) and len(text) <= MAX_DIGITS
    value = int(text) if whole else float(text)
    if not math.isfinite(value):
        shown = text if len(text) <= MAX_DIGITS else f"{text[:20]}..."
        raise MLFSError(f"{place} has the label {shown}, which is larger than any number here; correct it")
    return value


def is_continuous(values: list[Any], part: Part) -> bool:
    """Tells whether labels measure something: fractions, or more whole-numbered floats than there would be classes.

    Raises:
        MLFSError: some are fractions, and others no numbers: with one cell "n/a" a measurement would pass for as many
            classes as it has values.
    """
    if not all(isinstance(v, int | float) for v in values):
        fractions = [v for v in values if isinstance(v, str) and _NUMBER.fullmatch(v) and not float(v).is_integer()]
        if fractions:
            row, odd = next((row, v) for row, v in enumerate(values, 1) if not _NUMBER.fullmatch(v))
            raise MLFSError(
                f"row {row} of the {part.place} has the label {odd!r}, and others are numbers such as {fractions[0]}: "
                "correct it, or give --task classification"
            )
        return False
    floats = [v for v in values if isinstance(v, float)]
    return any(not v.is_integer() for v in floats) or (bool(floats) and len(set(values)) > MAX_WHOLE_FLOATS)


def float_labels(values: list[Any], part: Part) -> list[float]:
    """Makes labels for regression; raises MLFSError if one is a name."""
    for row, value in enumerate(values, 1):
        if isinstance(value, str) and not _NUMBER.fullmatch(value):
            raise MLFSError(f"row {row} of the {part.place} has the label {value!r}; regression needs numbers")
        if abs(float(value)) > MAX_FLOAT:
            raise MLFSError(
                f"row {row} of the {part.place} has the label {value}, which is larger than any float32; correct it"
            )
    return [float(value) for value in values]


def class_names(values: list[Any], part: Part, column: str) -> list[str]:
    """Lists the classes in the order of their ids: a `ClassLabel`'s own order, else sorted.

    Raises:
        MLFSError: training has one class only.
    """
    feature = part.features[column]
    names = feature.names if isinstance(feature, ClassLabel) else None
    if names is None:
        names = list(dict.fromkeys(_name(value) for value in sorted(set(values))))
    if part.name == "train" and len(names) < 2:
        raise MLFSError(f"the {part.place} has the one label {names[0]!r}; classification needs two or more")
    return names


def label_ids(names: list[str], values: list[Any], part: Part) -> list[int]:
    """Returns the position of each label in `names`; raises MLFSError, which names it, for one that is not there."""
    ids = {name: i for i, name in enumerate(names)}
    found = [_name(value) for value in values]
    odd = sorted(set(found) - set(ids))
    if odd:
        some = ", ".join(map(repr, odd[:5])) + (", ..." if len(odd) > 5 else "")
        known = ", ".join(map(repr, names[:10])) + (", ..." if len(names) > 10 else "")
        raise MLFSError(
            f"the {part.place} has labels that training lacks: {some}; expected {known}: make the names agree"
        )
    return [ids[name] for name in found]


def _require(part: Part, texts: tuple[str, ...], label: str | None) -> None:
    """Raises MLFSError unless the columns are there."""
    for column in (*texts, *([label] if label else [])):
        if column not in part.rows.column_names:
            raise MLFSError(f"no column {column!r} in the {part.place}; {part.found}")


def _guess_label(part: Part, taken: tuple[str, ...]) -> str | None:
    """Finds the label column by its name; None if no column has such a name."""
    lower = {column.lower(): column for column in part.rows.column_names if column not in taken}
    if "label" in lower:
        return lower["label"]
    found = [lower[name] for name in LABEL_NAMES if name in lower]
    if len(found) > 1:
        raise MLFSError(f"{' or '.join(found)} may be the label in the {part.place}; {part.found}; give --label_column")
    return found[0] if found else None


def _guess_texts(part: Part, label: str | None, most: int) -> tuple[str, ...]:
    """Finds up to `most` text columns: the only string columns there are, else ones with names of benchmarks."""
    columns = [c for c in part.rows.column_names if c != label and c.lower() not in ID_NAMES]
    found = tuple(c for c in columns if _is_string(part, c) and not _is_numeric(part, c))
    if 1 <= len(found) <= most:
        return found
    for known in KNOWN_TEXTS:
        if len(known) <= most and set(known) <= set(found):
            return known
    which = "several columns may be the text" if found else "no column holds text"
    raise MLFSError(f"{which} in the {part.place}; {part.found}; give --text_column (and --text_pair_column)")


def _is_string(part: Part, column: str) -> bool:
    return getattr(part.features[column], "dtype", None) in ("string", "large_string")


def _is_numeric(part: Part, column: str) -> bool:
    """Tells whether the first thousand strings of a column all spell numbers."""
    texts = part.head[column]
    filled = texts.filter(pc.greater(pc.binary_length(texts), 0))
    pattern = _NUMBER.pattern.replace(r"\d", r"\p{Nd}")  # what Python means by \d: digits of any script
    spelt = pc.match_substring_regex(filled, f"^(?:{pattern})$")
    return bool(len(filled)) and pc.all(spelt).as_py()


def _name(value: Any) -> str:
    """Spells a label out: 1.0 is the class "1", as a file of integers would have it."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return str(value)
