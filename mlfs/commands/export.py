"""`mlfs export`: writes one size of a run for others to load."""

from pathlib import Path

from mlfs.commands.run_folder import find_subnet, load_run
from mlfs.deploy.hf import write_checkpoint
from mlfs.errors import MLFSError


def export(run: Path, subnet: str, output_dir: Path, overwrite: bool = False) -> Path:
    """Writes one subnet of a run as a transformers checkpoint; returns its folder.

    Args:
        subnet: max, min, a name from the run's palette, or JSON.
        overwrite: whether a folder that is not empty is replaced.

    Raises:
        MLFSError: no such run or subnet, a folder that is taken, or sizes that no configuration can state.
    """
    if output_dir.exists() and not output_dir.is_dir():
        raise MLFSError(f"{output_dir} is a file: give a folder")
    if output_dir.exists() and any(output_dir.iterdir()) and not overwrite:
        raise MLFSError(f"{output_dir} is not empty: give another folder, or --overwrite to replace it")
    supernet, tokenizer = load_run(run)
    write_checkpoint(supernet, find_subnet(supernet, subnet, run), tokenizer, output_dir)
    return output_dir
