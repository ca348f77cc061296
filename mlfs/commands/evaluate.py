"""`mlfs eval`: scores one size of a run."""

import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mlfs.commands.run_folder import find_subnet, load_data_arguments, load_run
from mlfs.commands.train import trainer_options
from mlfs.data.arguments import DataArguments
from mlfs.data.raw import load_raw
from mlfs.errors import MLFSError
from mlfs.training.arguments import MLFSArguments
from mlfs.training.evaluation import PaletteTrainer


class _QuietTrainer(PaletteTrainer):
    """Logs nothing: one JSON object is all that is printed."""

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Does nothing."""


def evaluate(
    run: Path, subnet: str, data: DataArguments | None, batch_size: int, model: str | None = None
) -> dict[str, Any]:
    """Scores one subnet of a run on validation data (the run's own unless `data` names some).

    Args:
        subnet: max, min, a name from the run's palette, or JSON.
        batch_size: examples in a batch.
        model: where the base is, if not where it was in training: a Hub name or a folder.

    Raises:
        MLFSError: no such run, base, subnet or data; no examples in a batch.
    """
    if batch_size < 1:
        raise MLFSError(f"--batch_size is {batch_size}: expected at least 1")
    supernet, tokenizer = load_run(run, model)
    chosen = find_subnet(supernet, subnet, run)
    recorded, id2label = load_data_arguments(run, supernet)
    data = _data_to_read(recorded, data)
    if data.validation_file is None and data.train_file is None and data.dataset_name is None:
        raise MLFSError(f"{run} does not say what it was evaluated on: give --validation_file or --dataset_name")
    raw = load_raw(data, id2label)
    if raw.validation is None:
        raise MLFSError("no validation data: give --validation_file")
    with tempfile.TemporaryDirectory() as scratch:
        args = MLFSArguments(output_dir=scratch, per_device_eval_batch_size=batch_size, report_to=[])
        trainer = _QuietTrainer(supernet, args, **trainer_options(supernet, raw, tokenizer, data))
        trainer.palette = {"subnet": chosen}
        row = trainer.results(trainer.evaluate())[0]
    return {
        "run": str(run),
        "task": raw.task,
        "samples": len(raw.validation),
        **{key: value for key, value in row.items() if key != "name"},
    }


def _data_to_read(recorded: DataArguments, given: DataArguments | None) -> DataArguments:
    """Returns what was recorded in training, with what `given` says otherwise."""
    settings = asdict(recorded)
    if given is not None:
        named = given.named()
        if "validation_file" in named or "dataset_name" in named:
            settings |= {"train_file": None, "validation_file": None, "dataset_name": None}
        settings |= named
    if settings["validation_file"]:
        settings["train_file"] = None
    return DataArguments(**settings)
