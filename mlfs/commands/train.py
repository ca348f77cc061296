"""`mlfs train`: from names of a model and of data to a trained run and its table."""

import contextlib
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from mlfs.commands.bases import ModelArguments, load_model, load_tokenizer, make_supernet, max_length
from mlfs.commands.run_folder import RecordData, read_labels, save_results
from mlfs.data.arguments import DataArguments
from mlfs.data.metrics import compute_metrics_for, preprocess_logits_for_metrics
from mlfs.data.raw import RawData, load_raw
from mlfs.data.tokens import collator, tokenize
from mlfs.errors import MLFSError
from mlfs.report.baseline import baseline_of, warning
from mlfs.report.table import results_table
from mlfs.supernet.folders import locked_folder
from mlfs.supernet.model import SuperTransformer
from mlfs.training.arguments import MLFSArguments
from mlfs.training.checks import check_setup, one_line, setup_errors
from mlfs.training.runs import DATA_NAME, make_room, resume_point, stages_done
from mlfs.training.trainer import MLFSTrainer


class RunTrainer(MLFSTrainer):
    """Says after stage 0, before the other stages take their time, whether the whole model has learned the task.

    Attributes:
        baseline: what always the same answer scores; None where there is none to speak of.
    """

    def __init__(self, task_name: str, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.baseline = baseline_of(task_name, _labels_of(self.eval_dataset))

    def _leave_stage(self) -> None:
        super()._leave_stage()
        if self.baseline is None or self.stage or self.stage == self.args.stages_to_train[-1]:
            return
        with self.supernet.activate(self.supernet.space.max):
            scores = self._score(self.get_eval_dataloader(), "Evaluation after stage 0", [], "eval")
        row = {"name": "max", **scores}
        if self.is_world_process_zero() and self.baseline.metric in row:
            print(f"\nafter stage 0 the whole model scores {row[self.baseline.metric]:.4g}; ", end="")
            self.compare([row])

    def compare(self, rows: list[dict[str, Any]]) -> None:
        """Prints the baseline, and which of the rows are not clearly better."""
        if self.baseline is not None:
            print(self.baseline)
            if said := warning(self.baseline, rows):
                print(said)


def make_trainer(
    supernet: SuperTransformer,
    raw: RawData,
    tokenizer: PreTrainedTokenizerBase,
    data: DataArguments,
    args: MLFSArguments,
) -> RunTrainer:
    """Makes a trainer of `supernet` on the data, with the task's metrics; it records how the data was read."""
    options = trainer_options(supernet, raw, tokenizer, data)
    record = RecordData(Path(args.output_dir or "."), data, raw)
    with setup_errors("these options cannot be trained with"):
        return RunTrainer(raw.task, supernet, args, **options, callbacks=[record])


def _labels_of(dataset: Any) -> list[float]:
    """Lists the labels of a data set; none where it has no column of them."""
    names = getattr(dataset, "column_names", None) or []
    return list(dataset["labels"]) if "labels" in names else []


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
    """Trains, evaluates the palette, prints the table and writes `results.json`; returns its rows.

    What can be refused without data and model is refused before they are loaded.

    Raises:
        MLFSError: options, data or a model that cannot be trained; a run folder that is taken, or cannot be written.
    """
    check_setup(args)
    run = Path(args.output_dir or ".")
    with locked_folder(run) if args.should_save else contextlib.nullcontext():
        resume = _resume(args)
        point = resume_point(run, args.stages_to_train, resume)
        done = stages_done(point, args.stages_to_train) if resume else []
        left = [stage for stage in args.stages_to_train if stage not in done]
        make_room(run, left, point, resumes=bool(resume), overwrite=args.overwrite_run, delete=False)
        return _train(model_args, data, args, resume, point.run)


def _train(
    model_args: ModelArguments, data: DataArguments, args: MLFSArguments, resume: str | bool, began: Path
) -> list[dict[str, Any]]:
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
    if resume:
        _check_labels(began, raw)
    trainer = make_trainer(supernet, raw, tokenizer, data, args)
    try:
        trainer.train(resume_from_checkpoint=resume)
    except (ImportError, KeyError) as error:  # of an option that transformers reads only now
        if isinstance(error, KeyError) and "metric_for_best_model" not in str(error):
            raise
        raise MLFSError(one_line(error)) from error
    return finish(trainer, raw)


def _check_labels(run: Path, raw: RawData) -> None:
    """Raises MLFSError where a run would go on with other labels than it began with."""
    if not (run / DATA_NAME).exists():
        return
    began = read_labels(run)
    if began != raw.id2label:
        raise MLFSError(
            f"the run in {run} began with the labels {began}, this data has {raw.id2label}: resume with its data"
        )


def finish(trainer: RunTrainer, raw: RawData) -> list[dict[str, Any]]:
    """Evaluates the palette, prints it as a table and writes it as JSON."""
    rows = trainer.results(trainer.evaluate())
    if trainer.is_world_process_zero():
        print("\n" + results_table(rows))
        trainer.compare(rows)
        path = save_results(trainer.run_folder, raw.task, rows)
        print(f"\nwritten to {path}")
    return rows


def _resume(args: MLFSArguments) -> str | bool:
    """What `resume_from_checkpoint` says: a truth value, or a path."""
    value = args.resume_from_checkpoint or ""
    return {"true": True, "false": False, "": False}.get(value.lower(), value)
