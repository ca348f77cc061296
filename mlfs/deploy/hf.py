"""Writes a subnet as a transformers checkpoint, which loads without mlfs."""

import tempfile
from fnmatch import fnmatch
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mlfs.deploy.model_card import model_card
from mlfs.errors import MLFSError
from mlfs.files import shortened
from mlfs.space.subnet import Subnet
from mlfs.supernet.folders import make_folder, run_around, run_within
from mlfs.supernet.model import SuperTransformer

# What `save_pretrained` of models and tokenizers writes.
_EXPORTED = (
    "README.md", "*.safetensors", "*.safetensors.index.json", "config.json", "generation_config.json", "*token*.json",
    "*.jinja", "vocab.*", "merges.txt", "*.model",
)  # fmt: skip


def write_checkpoint(
    supernet: SuperTransformer,
    subnet: Subnet,
    tokenizer: PreTrainedTokenizerBase,
    output_dir: Path,
    finished: PreTrainedModel | None = None,
) -> None:
    """Writes `subnet` with tokenizer and model card to `output_dir`, in place of what is there.

    Args:
        finished: a copy of the subnet that has trained on alone, to be written in its place.

    Everything is written beside the folder first, so that a write that fails leaves what was there.

    Raises:
        MLFSError: the family's configuration cannot state the subnet's sizes, or the folder is, contains or lies in a
            run, or cannot be written.
    """
    check_place(output_dir)
    if output_dir.is_dir() and (inner := run_within(output_dir)) is not None:
        raise MLFSError(f"{output_dir} contains the run {inner}, which is never replaced: give another folder")
    if not supernet.is_exportable(subnet):
        raise MLFSError(supernet.why_not_exportable(subnet))
    small = supernet.extract(subnet) if finished is None else finished
    output_dir = output_dir.resolve()  # a link stays, and what it names is replaced
    make_folder(output_dir.parent)
    with tempfile.TemporaryDirectory(prefix=".tmp-", dir=output_dir.parent) as scratch:
        folder = Path(scratch) / "checkpoint"
        try:
            small.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            (folder / "README.md").write_text(
                model_card(supernet, subnet, small, finished is not None), encoding="utf-8"
            )
        except OSError as error:
            raise MLFSError(
                f"could not write {output_dir}: {error}. Free some disk space, or export elsewhere"
            ) from error
        _put_in_place(folder, output_dir, Path(scratch) / "replaced")


def check_place(output_dir: Path) -> None:
    """Raises MLFSError if `output_dir` is a file, or is or lies in a run."""
    try:
        if output_dir.exists() and not output_dir.is_dir():
            raise MLFSError(f"{output_dir} is a file: give a folder")
        run = run_around(output_dir)
    except OSError as error:  # such as a name that is too long
        raise MLFSError(f"{shortened(output_dir)} cannot be written: {error.strerror}; give another folder") from None
    if run is not None:
        raise MLFSError(f"{output_dir} is or lies in the run {run}, which is never replaced: give a folder outside it")


def why_no_export(folder: Path) -> str | None:
    """Says, in some words, why a folder is no earlier export that may be replaced; None if it is one, or is empty."""
    names = sorted(path.name for path in folder.iterdir())
    if not names:
        return None
    card = folder / "README.md"
    if "config.json" not in names or not card.is_file() or not _is_card(card):
        return "it has no model card of mlfs beside a config.json"
    for name in names:
        if (folder / name).is_dir() or not any(fnmatch(name, pattern) for pattern in _EXPORTED):
            return f"{name} is not of an export"
    return None


def _is_card(path: Path) -> bool:
    """Whether a README is a model card that `write_checkpoint` wrote."""
    return "\ntags: [mlfs]\n" in path.read_text(encoding="utf-8", errors="replace")[:10_000]


def _put_in_place(new: Path, place: Path, aside: Path) -> None:
    """Moves a finished folder to `place`; what is there moves aside first, and back if that fails."""
    try:
        if place.exists():
            place.replace(aside)
        new.replace(place)
    except OSError as error:
        if aside.exists() and not place.exists():
            aside.replace(place)
        raise MLFSError(f"could not write {place}: {error}; what was there is there. Export elsewhere") from error
