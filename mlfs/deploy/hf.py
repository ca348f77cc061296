"""Writes a subnet as a transformers checkpoint, which loads without mlfs."""

import shutil
import tempfile
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from mlfs.deploy.model_card import model_card
from mlfs.errors import MLFSError
from mlfs.space.subnet import Subnet
from mlfs.supernet.model import SuperTransformer


def write_checkpoint(
    supernet: SuperTransformer, subnet: Subnet, tokenizer: PreTrainedTokenizerBase, output_dir: Path
) -> None:
    """Writes `subnet` with tokenizer and model card to `output_dir`, in place of what is there.

    Everything is written beside the folder first, so that a write that fails leaves what was there.

    Raises:
        MLFSError: the family's configuration cannot state the subnet's sizes, or the folder cannot be written.
    """
    if not supernet.is_exportable(subnet):
        raise MLFSError(supernet.why_not_exportable(subnet))
    small = supernet.extract(subnet)
    output_dir.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".tmp-", dir=output_dir.parent) as scratch:
        folder = Path(scratch) / "checkpoint"
        try:
            small.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            (folder / "README.md").write_text(model_card(supernet, subnet, small), encoding="utf-8")
        except OSError as error:
            raise MLFSError(
                f"could not write {output_dir}: {error}. Free some disk space, or export elsewhere"
            ) from error
        if output_dir.exists():
            shutil.rmtree(output_dir)
        folder.replace(output_dir)
