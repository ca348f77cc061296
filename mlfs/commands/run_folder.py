"""What a run folder holds beside the super-transformer: how its data was read, and its results."""

import json
from dataclasses import asdict
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from mlfs.commands.bases import load_tokenizer
from mlfs.data.arguments import DataArguments
from mlfs.data.raw import RawData
from mlfs.errors import MLFSError
from mlfs.files import write_json
from mlfs.space.subnet import Subnet
from mlfs.supernet.model import SuperTransformer

DATA_NAME = "data.json"
RESULTS_NAME = "results.json"


def load_run(run: Path) -> tuple[SuperTransformer, PreTrainedTokenizerBase]:
    """Loads the super-transformer and the tokenizer of a run folder; MLFSError where it holds no whole run."""
    supernet = SuperTransformer.from_pretrained(run)
    place = str(run) if (run / "tokenizer_config.json").exists() else str(supernet.base_name)
    return supernet, load_tokenizer(place)


def find_subnet(supernet: SuperTransformer, text: str, run: Path | None = None) -> Subnet:
    """Finds the subnet that a user names.

    Args:
        text: max, min, a name of the palette, or JSON.
        run: the run folder, whose results name the palette it was evaluated with.

    Raises:
        MLFSError: no such name, or sizes that are not in the space.
    """
    named = supernet.space.palette()
    if run is not None and (run / RESULTS_NAME).exists():
        rows = json.loads((run / RESULTS_NAME).read_text(encoding="utf-8"))["palette"]
        named |= {row["name"]: Subnet.from_dict(row["sizes"]) for row in rows}
    if text in named:
        return named[text]
    if not text.lstrip().startswith("{"):
        raise MLFSError(
            f"subnet {text!r}: expected one of {', '.join(named)}, or JSON such as {supernet.space.min.to_json()}"
        )
    subnet = Subnet.from_json(text)
    supernet.space.check(subnet)
    return subnet


def save_data_arguments(run: Path, data: DataArguments, raw: RawData) -> None:
    """Records how the data was read, so that `mlfs eval` reads its like."""
    run.mkdir(parents=True, exist_ok=True)
    settings = asdict(data) | {"task": raw.task}
    write_json(run / DATA_NAME, {"arguments": settings, "id2label": raw.id2label})


def load_data_arguments(run: Path) -> tuple[DataArguments, dict[int, str] | None]:
    """Reads what `save_data_arguments` recorded: how the data was read, and the names of the labels.

    Defaults and None for a super-transformer that was saved by hand; MLFSError for a damaged file.
    """
    if not (run / DATA_NAME).exists():
        return DataArguments(), None
    try:
        state = json.loads((run / DATA_NAME).read_text(encoding="utf-8"))
        labels = {int(i): name for i, name in state["id2label"].items()}
        return DataArguments(**state["arguments"]), labels or None
    except (ValueError, KeyError, TypeError) as error:
        raise MLFSError(
            f"{run / DATA_NAME} is damaged ({error}): delete it and name the data on the command line"
        ) from None
