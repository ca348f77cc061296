"""`mlfs eval`: scores one size of a run."""

import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mlfs.commands.run_folder import find_subnet, load_data_arguments, load_run
from mlfs.commands.train import make_trainer
from mlfs.data.arguments import DataArguments
from mlfs.data.raw import load_raw
from mlfs.errors import MLFSError
from mlfs.training.arguments import MLFSArguments


def evaluate(run: Path, subnet: str, data: DataArguments | None, batch_size: int) -> dict[str, Any]:
    """Scores one subnet of a run on validation data (the run's own unless `data` names some)."""
    supernet, tokenizer = load_run(run)
    chosen = find_subnet(supernet, subnet, run)
    recorded, id2label = load_data_arguments(run)
    settings = asdict(recorded)
    if data is not None:  # what is not said again is as it was in training
        named = {k: v for k, v in asdict(data).items() if v != getattr(DataArguments(), k)}
        if named.keys() & {"validation_file", "dataset_name"}:
            settings |= {"train_file": None, "validation_file": None, "dataset_name": None}
        settings |= named
    if settings["validation_file"]:
        settings["train_file"] = None
    data = DataArguments(**settings)
    raw = load_raw(data, id2label)
    if raw.validation is None:
        raise MLFSError("no validation data: give --validation_file")
    with tempfile.TemporaryDirectory() as scratch:
        args = MLFSArguments(output_dir=scratch, per_device_eval_batch_size=batch_size, report_to=[])
        trainer = make_trainer(supernet, raw, tokenizer, data, args)
        trainer.palette = {"subnet": chosen}
        trainer.log = lambda *_, **__: None  # type: ignore[method-assign]  # one JSON object is all that is printed
        row = trainer.results(trainer.evaluate())[0]
    return {
        "run": str(run),
        "task": raw.task,
        "samples": len(raw.validation),
        **{k: v for k, v in row.items() if k != "name"},
    }
