"""`DataArguments`, which says where the data is and how to read it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from mlfs.errors import MLFSError

TASKS = ("auto", "classification", "regression", "causal-lm")


@dataclass
class DataArguments:
    """Says where the data is and how to read it; each field's metadata has its help.

    Made by keyword, or from the command line (`mlfs.commands.options`).

    Raises:
        MLFSError: a value is none of the choices, or is out of range.
    """

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

    def named(self) -> dict[str, Any]:
        """Collects the options that are not at their defaults."""
        defaults = asdict(DataArguments())
        return {name: value for name, value in asdict(self).items() if value != defaults[name]}
