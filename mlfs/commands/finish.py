"""`mlfs finish`: trains one size of a run on alone, and writes it for others to load."""

import contextlib
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mlfs.commands.export import check_target
from mlfs.commands.run_folder import find_subnet, load_data_arguments, load_run
from mlfs.commands.train import trainer_options
from mlfs.data.arguments import DataArguments
from mlfs.data.raw import load_raw
from mlfs.deploy.hf import write_checkpoint
from mlfs.errors import MLFSError
from mlfs.supernet.folders import make_folder
from mlfs.training.arguments import MLFSArguments
from mlfs.training.checks import check_setup
from mlfs.training.finishing import FinishingTrainer


def finish(
    run: Path,
    subnet: str,
    output_dir: Path,
    overwrite: bool = False,
    model: str | None = None,
    data: DataArguments | None = None,
    **options: Any,
) -> dict[str, Any] | None:
    """Trains one subnet of a run on alone, with all of its weights, and writes it as a transformers checkpoint.

    The run stays as it is.

    Args:
        subnet: max, min, a name from the run's palette, sizes, or JSON.
        output_dir: a folder that is new or empty, outside of any run.
        overwrite: whether an earlier export in it is replaced.
        model: where the base is, if not where it was in training: a Hub name or a folder.
        data: what is trained and validated on; by default the run's own.
        **options: of MLFSArguments.

    Returns:
        What the size scored before and after, by metric, and the folder; None but in the first of several processes.

    Raises:
        MLFSError: no such run or subnet, a folder that is taken, sizes that no configuration can state, no data.
    """
    check_target(output_dir, overwrite)
    make_folder(output_dir.resolve().parent)
    with tempfile.TemporaryDirectory() as scratch:
        args = MLFSArguments(output_dir=scratch, report_to=[], save_strategy="no", **options)
        check_setup(args)
        if args.max_steps == 0 or args.num_train_epochs == 0:
            raise MLFSError("nothing to train: give --num_train_epochs or --max_steps more than 0")
        supernet, tokenizer = load_run(run, model)
        chosen = find_subnet(supernet, subnet, run)
        if not supernet.is_exportable(chosen):
            raise MLFSError(supernet.why_not_exportable(chosen))
        recorded, id2label = load_data_arguments(run, supernet)
        data = _data_to_read(run, recorded, data)
        raw = load_raw(data, id2label)
        if raw.train is None:
            raise MLFSError("no training data: give --train_file or --dataset_name")
        trainer = FinishingTrainer(supernet, chosen, args, **trainer_options(supernet, raw, tokenizer, data))
        with contextlib.redirect_stdout(sys.stderr):  # what the Trainer logs; what is returned may be printed
            before = _scores(trainer)
            trainer.train()
            after = _scores(trainer)
        if not trainer.is_world_process_zero():
            return None
        write_checkpoint(supernet, chosen, tokenizer, output_dir, finished=trainer.small)
    return {"subnet": str(chosen), "before": before, "after": after, "output_dir": str(output_dir)}


def _data_to_read(run: Path, recorded: DataArguments, given: DataArguments | None) -> DataArguments:
    """Returns what to train and validate on: what was recorded in training, with what `given` says otherwise."""
    settings, named = asdict(recorded), given.named() if given is not None else {}
    if "train_file" in named:
        settings |= {"dataset_name": None, "dataset_config_name": None, "validation_split": None}
    if "dataset_name" in named:
        settings |= {"train_file": None, "validation_file": None}
    settings |= named
    if settings["train_file"] is None and settings["dataset_name"] is None:
        raise MLFSError(f"{run} does not say what it was trained on: give --train_file or --dataset_name")
    return DataArguments(**settings)


def _scores(trainer: FinishingTrainer) -> dict[str, float]:
    """Scores the size on the validation data; nothing where there is none."""
    if trainer.eval_dataset is None:
        return {}
    found = {key.removeprefix("eval_"): value for key, value in trainer.evaluate().items()}
    return {key: value for key, value in found.items() if not key.endswith(("_per_second", "runtime", "_time"))}
