"""What a run folder holds beside the super-transformer: how its data was read, and its results."""

import re
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase
from transformers.trainer_callback import TrainerCallback

from mlfs.commands.bases import load_tokenizer
from mlfs.data.arguments import DataArguments
from mlfs.data.raw import RawData
from mlfs.errors import MLFSError
from mlfs.files import checksum, read_json, write_json
from mlfs.space.subnet import Subnet
from mlfs.supernet.model import SuperTransformer
from mlfs.training.checks import SETUP_ERRORS, one_line
from mlfs.training.file_list import LIST_NAME, what_is_wrong
from mlfs.training.runs import DATA_NAME, RESULTS_NAME

_TOKENIZER_FILES = ("*token*.json", "*.jinja", "vocab.*", "merges.txt", "*.model")


def load_run(run: Path, model: str | None = None) -> tuple[SuperTransformer, PreTrainedTokenizerBase]:
    """Loads the super-transformer and the tokenizer of a run folder.

    Args:
        model: where the base is, if not where it was in training: a Hub name or a folder.

    Raises:
        MLFSError: the folder holds no whole run, or its base is not found.
    """
    supernet = SuperTransformer.from_pretrained(run, model)
    wrong = what_is_wrong(run, _TOKENIZER_FILES) if (run / LIST_NAME).exists() else None
    if wrong is None:
        if not (run / "tokenizer_config.json").exists():
            return supernet, load_tokenizer(str(supernet.base_name))
        try:
            return supernet, load_tokenizer(str(run))
        except MLFSError as error:
            wrong = str(error)
        except Exception as error:  # of the tokenizers library, which has no other class
            wrong = one_line(error)
    raise MLFSError(f"the tokenizer in {run} is damaged ({wrong}): restore its files")


def find_subnet(supernet: SuperTransformer, text: str, run: Path | None = None) -> Subnet:
    """Finds the subnet that a user names.

    Args:
        text: max, min, a name of the palette, hidden/heads/ffn/layers as in the table of results, or JSON.
        run: the run folder, whose results name the palette it was evaluated with. They are read only for such a name.

    Raises:
        MLFSError: no such name, or sizes that are not in the space.
    """
    if text.lstrip().startswith("{"):
        return supernet.layer_sizes(Subnet.from_json(text)).subnet
    if sizes := re.fullmatch(r"(\d+)/(\d+)/(\d+)/(\d+)", text.strip()):
        return supernet.layer_sizes(Subnet(*map(int, sizes.groups()))).subnet  # type: ignore[arg-type]
    if text in ("max", "min"):
        return getattr(supernet.space, text)  # type: ignore[no-any-return]
    named = supernet.space.palette()
    if run is not None:
        named |= _palette_of(run)
    if text in named:
        return supernet.layer_sizes(named[text]).subnet
    raise MLFSError(
        f"subnet {text!r}: expected one of {', '.join(named)}, sizes such as {supernet.space.min}, or JSON such as "
        f"{supernet.space.min.to_json()}"
    )


def save_results(run: Path, task: str, rows: list[dict[str, Any]]) -> Path:
    """Writes what the palette scored; returns the file."""
    _write_checked(run / RESULTS_NAME, {"task": task, "palette": rows})
    return run / RESULTS_NAME


def _palette_of(run: Path) -> dict[str, Subnet]:
    """Reads the subnets that a run was evaluated with, by name; none where it has no results."""
    path = run / RESULTS_NAME
    if not path.exists():
        return {}
    try:
        rows = _read_checked(path)["palette"]
        return {row["name"]: Subnet.from_dict(row["sizes"]) for row in rows}
    except (*SETUP_ERRORS, MLFSError) as error:
        raise MLFSError(
            f"{path} is damaged ({one_line(error)}): restore it, or give --subnet max, min or sizes as JSON"
        ) from None


def save_data_arguments(run: Path, data: DataArguments, raw: RawData) -> None:
    """Records how the data was read, so that `mlfs eval` reads its like."""
    run.mkdir(parents=True, exist_ok=True)
    settings = asdict(data) | {"task": raw.task}
    _write_checked(run / DATA_NAME, {"arguments": settings, "id2label": raw.id2label})


class RecordData(TrainerCallback):
    """Records how the data was read once training begins: no sooner, since a run that is refused records nothing."""

    def __init__(self, run: Path, data: DataArguments, raw: RawData) -> None:
        self.run, self.data, self.raw = run, data, raw

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Writes `data.json`."""
        if args.should_save:
            save_data_arguments(self.run, self.data, self.raw)


def load_data_arguments(run: Path, supernet: SuperTransformer) -> tuple[DataArguments, dict[int, str] | None]:
    """Reads what `save_data_arguments` recorded: how the data was read, and the names of the labels.

    A stage's folder has what its run has. Defaults and None for a super-transformer that was saved by hand.

    Raises:
        MLFSError: the file is damaged, or is of another run: its labels are not the model's.
    """
    path = run / DATA_NAME
    if not path.exists() and run.absolute().name.startswith("stage-"):
        path = run.absolute().parent / DATA_NAME
    trained = _labels(supernet)
    if not path.exists():
        return DataArguments(), None
    recorded, labels = _read_data(path)
    if labels and trained and labels != trained:
        raise MLFSError(
            f"{path} is of another run: its labels are {labels}, the model was trained on {trained}; restore it, or "
            "delete it and name the data on the command line"
        )
    return recorded, labels or None


def read_labels(run: Path) -> dict[int, str]:
    """Reads the names of the labels that a run began with, by id; MLFSError for a damaged record."""
    return _read_data(run / DATA_NAME)[1]


def is_of_unnamed_data(run: Path) -> bool:
    """Tells whether a run's data came from no file and no data set, as in the demo."""
    if not (run / DATA_NAME).exists():
        return False
    data = _read_data(run / DATA_NAME)[0]
    return data.train_file is None and data.validation_file is None and data.dataset_name is None


def _read_data(path: Path) -> tuple[DataArguments, dict[int, str]]:
    try:
        state = _read_checked(path)
        labels = {int(i): name for i, name in state["id2label"].items()}
        return DataArguments(**state["arguments"]), labels
    except (*SETUP_ERRORS, MLFSError) as error:
        raise MLFSError(
            f"{path} is damaged ({one_line(error)}): restore it, or delete it and name the data on the command line"
        ) from None


def _labels(supernet: SuperTransformer) -> dict[int, str] | None:
    """The names of the labels that the model was trained on, by id; None where it has no names of its own."""
    named = getattr(supernet.model.config, "id2label", None) or {}
    labels = {int(i): str(name) for i, name in named.items()}
    made_up = all(name == f"LABEL_{i}" for i, name in labels.items())
    return None if made_up or not type(supernet.model).__name__.endswith("Classification") else labels


def _write_checked(path: Path, values: dict[str, Any]) -> None:
    """Writes a JSON object with its checksum."""
    write_json(path, values | {"checksum": checksum(values)})


def _read_checked(path: Path) -> Mapping[str, Any]:
    """Reads what `_write_checked` wrote, or an earlier version without a checksum; raises ValueError if it differs."""
    values = read_json(path)
    if "checksum" in values and values.pop("checksum") != checksum(values):
        raise ValueError("its checksum differs: it was changed after it was written")
    return values  # type: ignore[no-any-return]
