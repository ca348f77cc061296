"""`mlfs export`: writes one size of a run for others to load."""

from pathlib import Path

from mlfs.commands.run_folder import find_subnet, load_run
from mlfs.deploy.hf import check_place, why_no_export, write_checkpoint
from mlfs.errors import MLFSError
from mlfs.supernet.folders import make_folder


def export(run: Path, subnet: str, output_dir: Path, overwrite: bool = False, model: str | None = None) -> Path:
    """Writes one subnet of a run as a transformers checkpoint; returns its folder.

    Args:
        subnet: max, min, a name from the run's palette, or JSON.
        output_dir: a folder that is new or empty, outside of any run.
        overwrite: whether an earlier export in it is replaced.
        model: where the base is, if not where it was in training: a Hub name or a folder.

    Raises:
        MLFSError: no such run or subnet, a folder that is taken, or sizes that no configuration can state.
    """
    check_target(output_dir, overwrite)
    make_folder(output_dir.resolve().parent)
    supernet, tokenizer = load_run(run, model)
    write_checkpoint(supernet, find_subnet(supernet, subnet, run), tokenizer, output_dir)
    return output_dir


def check_target(output_dir: Path, overwrite: bool) -> None:
    """Raises MLFSError unless an export may be written to a folder: it is new or empty, or holds an earlier one that is
    to be replaced; and is no part of a run."""
    if not overwrite and output_dir.is_dir() and any(output_dir.iterdir()):
        raise MLFSError(f"{output_dir} is not empty: give another folder, or --overwrite to replace an earlier export")
    check_place(output_dir)
    if output_dir.is_dir() and (wrong := why_no_export(output_dir)) is not None:
        raise MLFSError(f"{output_dir} is no earlier export ({wrong}), so it stays: give another folder")
