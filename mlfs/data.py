"""Data files and Hub data sets, made into what a model takes.

Three steps, each usable alone: `load_raw` reads (files through the packaged readers of `datasets`, so that large files
stay on disk and are read once), `prepare` finds the task, the columns and the labels, `tokenize` makes token ids. The
rules that `prepare` guesses by, all overridden by an argument:

- **label**: the column named `label`; else the only one named like one (`data_columns.LABEL_NAMES`, any case).
- **texts**: the string columns that are left, in order, without identifiers and numbers; one is a text, two are a
  pair. Among more, a pair or a name that benchmarks use (`KNOWN_TEXTS`) is taken.
- **task**: a text column alone is causal-lm. Fractional labels, or more than 20 distinct floats, are regression. All
  others are classification: labels sorted by number, or by name, become ids (a Hub `ClassLabel` keeps its order).
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow.compute as pc
from datasets import ClassLabel, Dataset, DatasetDict, Features, List, Value
from transformers import DataCollatorWithPadding, PreTrainedTokenizerBase, default_data_collator

from mlfs.data_columns import (
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
from mlfs.data_files import read_files, read_hub
from mlfs.errors import MLFSError

TASKS = ("auto", "classification", "regression", "causal-lm")

logger = logging.getLogger(__name__)


@dataclass
class DataArguments:
    """Where the data is and how to read it; made for `transformers.HfArgumentParser`, or by keyword."""

    train_file: str | None = field(
        default=None,
        metadata={
            "help": "Training data: a .csv, .tsv (no quoting), .json, .jsonl, .parquet, .txt or source file, a glob "
            "pattern of one kind, or a folder of source and text files."
        },
    )
    validation_file: str | None = field(default=None, metadata={"help": "Validation data, as --train_file."})
    dataset_name: str | None = field(
        default=None, metadata={"help": "Instead of files: a data set of the Hugging Face Hub, such as nyu-mll/glue."}
    )
    dataset_config_name: str | None = field(
        default=None, metadata={"help": "Its configuration, such as sst2; GLUE tasks know their columns and metrics."}
    )
    train_split: str = field(default="train", metadata={"help": "Its split to train on; train[:10%%] takes a part."})
    validation_split: str | None = field(
        default=None, metadata={"help": "Its split to validate on (default: validation, validation_matched or dev)."}
    )
    validation_fraction: float = field(
        default=0.0, metadata={"help": "Where there is no validation data: hold out this share of the training rows."}
    )
    task: str = field(
        default="auto", metadata={"help": "What to learn (auto: read off the columns).", "choices": list(TASKS)}
    )
    text_column: str | None = field(default=None, metadata={"help": "Column of the text (default: guessed)."})
    text_pair_column: str | None = field(
        default=None, metadata={"help": "Column of the second text of a pair (default: guessed)."}
    )
    label_column: str | None = field(default=None, metadata={"help": "Column of the label (default: guessed)."})
    documents: str = field(
        default="auto",
        metadata={
            "help": "A document of a text file is a line or the whole file (auto: a line of .txt, else the file).",
            "choices": ["auto", "line", "file"],
        },
    )
    max_seq_length: int | None = field(
        default=None,
        metadata={"help": "Cut texts to this many tokens (default: no cut; a text the model cannot take is an error)."},
    )
    block_size: int | None = field(
        default=None, metadata={"help": "Tokens in one causal-lm example (default: 1024, or the model's maximum)."}
    )
    max_train_samples: int | None = field(
        default=None, metadata={"help": "Train on this many examples, a fixed random choice (default: all)."}
    )
    max_eval_samples: int | None = field(
        default=None, metadata={"help": "Validate on this many examples, a fixed random choice (default: all)."}
    )
    preprocessing_num_workers: int | None = field(default=None, metadata={"help": "Processes that tokenize."})
    data_cache: str | None = field(
        default=None, metadata={"help": "Folder for the files `datasets` caches (default: its own, HF_DATASETS_CACHE)."}
    )

    def __post_init__(self) -> None:
        for name, known in (("task", TASKS), ("documents", ("auto", "line", "file"))):
            if getattr(self, name) not in known:
                raise MLFSError(f"--{name} is {getattr(self, name)!r}; it must be one of {', '.join(known)}")
        for name in ("max_seq_length", "block_size", "max_train_samples", "max_eval_samples"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise MLFSError(f"--{name} is {value}; give a number of at least 1, or leave it out")
        if not 0 <= self.validation_fraction < 1:
            raise MLFSError(f"--validation_fraction is {self.validation_fraction}; give a share from 0 up to 1")


@dataclass(frozen=True)
class RawData:
    """Texts and labels of one task, before tokens.

    `train` and `validation` (None where there is none) hold the `text_columns` (str) and, but for causal-lm, `labels`:
    a `ClassLabel` (classification) or float32 (regression). `num_labels` is 1 for regression and 0 for causal-lm;
    `glue_name` is the GLUE configuration where the data is GLUE from the Hub.
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
        return {name: i for i, name in self.id2label.items()}


def load_raw(args: DataArguments, id2label: dict[int, str] | None = None) -> RawData:
    """Read the data that `args` names. `id2label` fixes the labels, as when a trained model is evaluated.

    Raises `MLFSError` for a file that is missing, empty, unreadable or of an unknown kind, and as `prepare` does.
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
    """Find task, columns and labels of two data sets (one may be None) and sample rows as `args` says.

    Raises `MLFSError` for columns that are missing or ambiguous, for missing texts or labels, for labels in
    validation that training (or `id2label`) lacks, and for training data of one class.
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
            task = "regression" if id2label is None and is_continuous(values[0]) else "classification"
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
        by_name = _sample(by_name, args)
    return RawData(
        by_name.get("train"),
        by_name.get("validation"),
        task,
        texts,
        num_labels=len(names) or int(task == "regression"),
        id2label=dict(enumerate(names)),
        glue_name=glue_name(args),
    )


def tokenize(
    raw: RawData, tokenizer: PreTrainedTokenizerBase, args: DataArguments, model_max_length: int | None = None
) -> DatasetDict:
    """Token ids of `raw`, unpadded: a data set `train` and one `validation`, where `raw` has them.

    Columns: `input_ids`, `labels`, and but for causal-lm what else the tokenizer makes (`attention_mask`,
    `token_type_ids`). For causal-lm, documents joined by the end-of-sequence token are cut into blocks of
    `args.block_size` tokens, whose last, incomplete one is dropped; `labels` equal `input_ids`. The longest input is
    the smaller of `model_max_length` and the tokenizer's own maximum.

    Raises `MLFSError` for a text longer than that where `args.max_seq_length` does not cut it, for lengths above it,
    for text shorter than one block, and for a tokenizer without end-of-sequence token (causal-lm).
    """
    lengths = [n for n in (model_max_length, tokenizer.model_max_length) if n is not None and n < 10**9]
    limit = min(lengths, default=None)
    blocks = raw.task == "causal-lm"
    option, length = ("block_size", args.block_size) if blocks else ("max_seq_length", args.max_seq_length)
    if length is not None and limit is not None and length > limit:
        raise MLFSError(f"--{option} is {length}, but the model takes {limit} tokens; give --{option} {limit} or less")
    done = {}
    for name, rows in (("train", raw.train), ("validation", raw.validation)):
        if rows is None:
            continue
        if blocks:
            size = length or min(1024, limit or 1024)
            done[name] = _blocks(rows, name, raw.text_columns[0], tokenizer, size, args.preprocessing_num_workers)
            continue
        options = {"tokenizer": tokenizer, "columns": raw.text_columns, "cut": length, "limit": limit, "place": name}
        done[name] = rows.map(
            _encode,
            batched=True,
            with_indices=True,
            remove_columns=list(raw.text_columns),
            fn_kwargs=options,
            num_proc=args.preprocessing_num_workers,
            desc=f"Tokenizing {name}",
        )
    return DatasetDict(_sample(done, args) if blocks else done)


def collator(task: str, tokenizer: PreTrainedTokenizerBase) -> Callable[[list[dict[str, Any]]], dict[str, Any]]:
    """The function that makes a batch of examples: pads to the longest; causal-lm blocks are stacked.

    Raises `MLFSError` where padding is needed and the tokenizer has no padding token.
    """
    if task == "causal-lm":
        return default_data_collator
    if tokenizer.pad_token is None:
        raise MLFSError(
            "the tokenizer has no padding token, which batches of texts need; set tokenizer.pad_token = "
            "tokenizer.eos_token and model.config.pad_token_id = tokenizer.eos_token_id"
        )
    return DataCollatorWithPadding(tokenizer)


def _hold_out(rows: Dataset, fraction: float) -> dict[str, Dataset]:
    order = np.random.default_rng(0).permutation(len(rows))
    held = max(1, round(fraction * len(rows)))
    if held >= len(rows):
        raise MLFSError(f"--validation_fraction {fraction} of {len(rows)} rows leaves none to train on; give less")
    return {"train": rows.select(np.sort(order[held:])), "validation": rows.select(np.sort(order[:held]))}


def _sample(parts: dict[str, Dataset], args: DataArguments) -> dict[str, Dataset]:
    """A random choice, the same every time, in the original order; a larger one contains a smaller one."""
    most = {"train": args.max_train_samples, "validation": args.max_eval_samples}
    sampled = {}
    for name, rows in parts.items():
        count = most[name]
        chosen = np.random.default_rng(0).permutation(len(rows))[:count] if count is not None else None
        sampled[name] = rows if chosen is None or len(chosen) == len(rows) else rows.select(np.sort(chosen))
    return sampled


def _encode(
    batch: dict[str, list[Any]],
    indices: list[int],
    *,
    tokenizer: PreTrainedTokenizerBase,
    columns: tuple[str, ...],
    cut: int | None,
    limit: int | None,
    place: str,
) -> dict[str, Any]:
    texts = [batch[column] for column in columns]
    encoded = tokenizer(*texts, truncation=cut is not None, max_length=cut, padding=False, verbose=False)
    for index, text, ids in zip(indices, texts[0], encoded["input_ids"], strict=True):
        if limit is not None and len(ids) > limit:
            raise MLFSError(
                f"{place} row {index + 1} ({text[:40]!r}...) has {len(ids)} tokens, but the model takes {limit}; "
                f"give --max_seq_length {limit} to cut longer texts, or shorten them"
            )
    return dict(encoded)


def _blocks(
    rows: Dataset, place: str, column: str, tokenizer: PreTrainedTokenizerBase, size: int, workers: int | None
) -> Dataset:
    if tokenizer.eos_token_id is None:
        raise MLFSError("the tokenizer has no end-of-sequence token to join documents with; set tokenizer.eos_token")
    ids = List(Value("int32"))
    tokens = rows.map(
        _token_ids,
        batched=True,
        remove_columns=rows.column_names,
        features=Features({"input_ids": ids}),
        fn_kwargs={"tokenizer": tokenizer, "column": column},
        num_proc=workers,
        desc=f"Tokenizing {place}",
    )
    # One process, in order: what a batch leaves over begins the next one's first block.
    blocks = tokens.map(
        _packer(size),
        batched=True,
        remove_columns=["input_ids"],
        features=Features({"input_ids": ids, "labels": ids}),
        desc=f"Packing {place}",
    )
    if not len(blocks):
        count = pc.sum(pc.list_value_length(tokens.data.column("input_ids"))).as_py() or 0
        raise MLFSError(
            f"the {place} data has {count} tokens, less than one block of {size}; give more, or --block_size"
        )
    return blocks


def _token_ids(batch: dict[str, list[Any]], *, tokenizer: PreTrainedTokenizerBase, column: str) -> dict[str, Any]:
    texts = [text for text in batch[column] if text.strip()]
    if not texts:
        return {"input_ids": []}
    encoded = tokenizer(texts, add_special_tokens=False, truncation=False, padding=False, verbose=False)
    return {"input_ids": [[*ids, tokenizer.eos_token_id] for ids in encoded["input_ids"]]}


def _packer(size: int) -> Callable[[dict[str, list[list[int]]]], dict[str, list[list[int]]]]:
    rest: list[int] = []

    def pack(batch: dict[str, list[list[int]]]) -> dict[str, list[list[int]]]:
        rest.extend(itertools.chain.from_iterable(batch["input_ids"]))
        whole = len(rest) // size * size
        blocks = [rest[i : i + size] for i in range(0, whole, size)]
        del rest[:whole]
        return {"input_ids": blocks, "labels": blocks}

    return pack
