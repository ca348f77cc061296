"""Makes data files and Hub data sets into texts and labels of one task.

Three steps, each usable alone: `load_raw` reads (files through the packaged readers of `datasets`, so that large files
stay on disk and are read once), `prepare` finds the task, the columns and the labels, `tokenize` makes token ids. The
rules that `prepare` guesses by, all overridden by an argument:

- **label**: the column named `label`; else the only one named like one (`mlfs.data.columns.LABEL_NAMES`, any case).
- **texts**: the string columns that are left, in order, without identifiers and numbers; one is a text, two are a
  pair. Among more, a pair or a name that benchmarks use (`KNOWN_TEXTS`) is taken.
- **task**: a text column alone is causal-lm. Fractional labels, or more than 20 distinct floats, are regression. All
  others are classification: labels sorted by number, or by name, become ids (a Hub `ClassLabel` keeps its order).
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from datasets import ClassLabel, Dataset, Value

from mlfs.data.arguments import DataArguments
from mlfs.data.columns import (
    check_columns,
    class_names,
    find_columns,
    float_labels,
    glue_name,
    is_continuous,
    label_ids,
    parts_of,
    read_labels,
)
from mlfs.data.files import read_files, read_hub
from mlfs.errors import MLFSError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RawData:
    """Holds texts and labels of one task, before they become tokens.

    Attributes:
        train, validation: data sets, or None. They hold the `text_columns` (str) and, but for causal-lm, `labels`:
            `ClassLabel` (classification) or float32 (regression).
        task: "classification", "regression" or "causal-lm".
        text_columns: one column, or the two of a pair.
        num_labels: how many classes there are; 1 for regression, 0 for causal-lm.
        id2label: the names of the classes; empty for other tasks.
        glue_name: the GLUE task, such as "sst2", if the data is GLUE from the Hub.
    """

    train: Dataset | None
    validation: Dataset | None
    task: str
    text_columns: tuple[str, ...]
    num_labels: int = 0
    id2label: dict[int, str] = field(default_factory=dict)
    glue_name: str | None = None

    @property
    def label2id(self) -> dict[str, int]:
        """The id of each class by its name."""
        return {name: i for i, name in self.id2label.items()}


def load_raw(args: DataArguments, id2label: dict[int, str] | None = None) -> RawData:
    """Reads and prepares the data that `args` names.

    Args:
        id2label: fixes the ids of the labels, as when a trained model is evaluated.

    Raises:
        MLFSError: a file is missing, empty, unreadable or of an unknown kind; and as `prepare`.
    """
    if (args.dataset_name is None) == (args.train_file is None and args.validation_file is None):
        raise MLFSError("need one source of data: give --train_file and --validation_file, or --dataset_name")
    if args.dataset_name is not None:
        return prepare(*read_hub(args, args.dataset_name), args, id2label)
    train = read_files(args.train_file, "train_file", args) if args.train_file else None
    validation = read_files(args.validation_file, "validation_file", args) if args.validation_file else None
    return prepare(train, validation, args, id2label)


def prepare(
    train: Dataset | None, validation: Dataset | None, args: DataArguments, id2label: dict[int, str] | None = None
) -> RawData:
    """Finds task, columns and labels of two data sets, and samples rows as `args` says. One data set may be None.

    Args:
        id2label: fixes the ids of the labels, as when a trained model is evaluated.

    Raises:
        MLFSError: columns are missing or ambiguous, a text or a label is missing, validation has labels that training
            (or `id2label`) lacks, or training data has one class.
    """
    parts = parts_of(train, validation, args)
    task, texts, label = find_columns(parts[0], args)
    for part in parts:
        check_columns(part, texts, label)
    rows = [part.rows.select_columns(list(texts)) for part in parts]
    names: list[str] = []
    if label is not None:
        values = [read_labels(part, label) for part in parts]
        if task == "auto":
            task = "regression" if id2label is None and is_continuous(values[0], parts[0]) else "classification"
        if task == "regression":
            columns: list[list[Any]] = [float_labels(*pair) for pair in zip(values, parts, strict=True)]
            feature: Value | ClassLabel = Value("float32")
        else:
            names = [id2label[i] for i in sorted(id2label)] if id2label else class_names(values[0], parts[0], label)
            columns = [label_ids(names, *pair) for pair in zip(values, parts, strict=True)]
            feature = ClassLabel(names=names)
        rows = [r.add_column("labels", c, feature=feature) for r, c in zip(rows, columns, strict=True)]
    logger.info("task %s, texts from %s, labels from %s", task, texts, label)
    by_name = dict(zip([part.name for part in parts], rows, strict=True))
    if "validation" not in by_name and args.validation_fraction:
        by_name = _hold_out(by_name["train"], args.validation_fraction)
    if task != "causal-lm":  # there an example is a block, which does not exist yet
        by_name = sample(by_name, args)
    return RawData(
        by_name.get("train"),
        by_name.get("validation"),
        task,
        texts,
        num_labels=len(names) or int(task == "regression"),
        id2label=dict(enumerate(names)),
        glue_name=glue_name(args),
    )


def _hold_out(rows: Dataset, fraction: float) -> dict[str, Dataset]:
    """Splits a random share off for validation, the same every time; both parts keep the order of the rows."""
    order = np.random.default_rng(0).permutation(len(rows))
    held = max(1, round(fraction * len(rows)))
    if held >= len(rows):
        raise MLFSError(f"--validation_fraction {fraction} of {len(rows)} rows leaves none to train on; give less")
    return {"train": rows.select(np.sort(order[held:])), "validation": rows.select(np.sort(order[:held]))}


def sample(parts: dict[str, Dataset], args: DataArguments) -> dict[str, Dataset]:
    """Chooses as many rows of each data set as `args` allows, at random but the same ones every time.

    They stay in their order, and a larger choice contains a smaller one.
    """
    most = {"train": args.max_train_samples, "validation": args.max_eval_samples}
    sampled = {}
    for name, rows in parts.items():
        count = most[name]
        chosen = np.random.default_rng(0).permutation(len(rows))[:count] if count is not None else None
        sampled[name] = rows if chosen is None or len(chosen) == len(rows) else rows.select(np.sort(chosen))
    return sampled
