"""`mlfs train`: from names of a model and of data to a trained run and its table."""

from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from mlfs.commands.bases import ModelArguments, load_model, load_tokenizer, make_supernet, max_length
from mlfs.commands.run_folder import RESULTS_NAME, save_data_arguments
from mlfs.data.arguments import DataArguments
from mlfs.data.metrics import compute_metrics_for, preprocess_logits_for_metrics
from mlfs.data.raw import RawData, load_raw
from mlfs.data.tokens import collator, tokenize
from mlfs.errors import MLFSError
from mlfs.files import write_json
from mlfs.report.table import results_table
from mlfs.supernet.model import SuperTransformer
from mlfs.training.arguments import MLFSArguments
from mlfs.training.trainer import MLFSTrainer


def make_trainer(
    supernet: SuperTransformer,
    raw: RawData,
    tokenizer: PreTrainedTokenizerBase,
    data: DataArguments,
    args: MLFSArguments,
) -> MLFSTrainer:
    """Makes a trainer of `supernet` on the data, with the task's metrics."""
    return MLFSTrainer(supernet, args, **trainer_options(supernet, raw, tokenizer, data))


def trainer_options(
    supernet: SuperTransformer, raw: RawData, tokenizer: PreTrainedTokenizerBase, data: DataArguments
) -> dict[str, Any]:
    """Tokenizes the data and returns it as a Trainer takes it, with collator and metrics of the task."""
    sets = tokenize(raw, tokenizer, data, max_length(supernet.model))
    options: dict[str, Any] = {
        "train_dataset": sets.get("train"),
        "eval_dataset": sets.get("validation"),
        "processing_class": tokenizer,
        "data_collator": collator(raw.task, tokenizer),
        "compute_metrics": compute_metrics_for(raw.task, raw.glue_name, raw.num_labels or None),
    }
    if raw.task == "causal-lm":
        options["preprocess_logits_for_metrics"] = preprocess_logits_for_metrics
    return options


def train(model_args: ModelArguments, data: DataArguments, args: MLFSArguments) -> list[dict[str, Any]]:
    """Trains, evaluates the palette, prints the table and writes `results.json`; returns its rows."""
    raw = load_raw(data)
    if raw.train is None:
        raise MLFSError("no training data: give --train_file or --dataset_name")
    if raw.validation is None:
        raise MLFSError("no validation data: give --validation_file, or --validation_fraction 0.1 to hold some out")
    options = {"revision": model_args.revision, "trust_remote_code": model_args.trust_remote_code}
    tokenizer = load_tokenizer(model_args.model, **options)
    torch.manual_seed(args.seed)  # of the new head and the adapters
    model = load_model(model_args.model, raw, tokenizer, **options)
    supernet = make_supernet(model, model_args, args)
    trainer = make_trainer(supernet, raw, tokenizer, data, args)
    save_data_arguments(Path(args.output_dir or "."), data, raw)
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint and _flag(args.resume_from_checkpoint))
    return finish(trainer, raw)


def finish(trainer: MLFSTrainer, raw: RawData) -> list[dict[str, Any]]:
    """Evaluates the palette, prints it as a table and writes it as JSON."""
    rows = trainer.results(trainer.evaluate())
    if trainer.is_world_process_zero():
        print("\n" + results_table(rows))
        path = trainer.run_folder / RESULTS_NAME
        write_json(path, {"task": raw.task, "palette": rows})
        print(f"\nwritten to {path}")
    return rows


def _flag(value: str) -> str | bool:
    return {"true": True, "false": False}.get(value.lower(), value)
