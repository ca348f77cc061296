"""Rows of the contract with transformers' Trainer; tests/contracts/test_trainer.py holds them."""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from datasets import IterableDataset
from torch.nn.functional import cross_entropy
from transformers import DataCollatorWithPadding, TrainerCallback
from transformers.trainer_callback import ExportableState

from tests.contracts import page
from tests.tiny_models import make
from tests.trainers import rows

SAME, REFUSED, OWN, UNUSED = "as Trainer", "refused", "its own way", "as Trainer; not run here"


@dataclasses.dataclass(frozen=True)
class Row:
    """What is accepted or asked, what MLFSTrainer does, and why; with what to try it on."""

    asked: str
    does: str
    why: str = ""
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    others: Callable[[], dict[str, Any]] = dict  # further arguments of the trainer, made anew for each
    model: tuple[str, str] = ("bert", "ForSequenceClassification")

    @property
    def fields(self) -> tuple[str, ...]:
        """The options of TrainingArguments that the row is about."""
        return tuple(name.strip() for name in self.asked.split(","))


# ---- what users bring ---------------------------------------------------------------------------------------------


def accuracy(prediction: Any) -> dict[str, float]:
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def with_inputs(prediction: Any) -> dict[str, float]:
    return {"tokens": float(prediction.inputs.sum()), "losses": float(prediction.losses.sum())}


def by_batches(prediction: Any, compute_result: bool = False) -> dict[str, float]:
    return {"mean": float(prediction.predictions[0].mean())} if compute_result else {}


def scaled(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return logits * 2


def own_loss(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
    return cross_entropy(outputs.logits, labels, weight=torch.tensor([1.0, 3.0]))


class Stops(TrainerCallback):
    """Ends training after three steps."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = state.global_step >= 3


class Counts(TrainerCallback, ExportableState):
    """Counts steps, and is saved with checkpoints."""

    def __init__(self, count: int = 0) -> None:
        self.count = count

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.count += 1

    def state(self) -> dict[str, Any]:
        return {"args": {"count": self.count}, "attributes": {}}


class Records(TrainerCallback):
    """Records every call of a callback: its name, the step, and what was asked for."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def __getattribute__(self, name: str) -> Any:
        if not name.startswith("on_"):
            return object.__getattribute__(self, name)

        def call(args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.calls.append((name, state.global_step, state.max_steps, *vars(control).values(), sorted(kwargs)))

        return call


class Tokenizer:
    """As much of a tokenizer as a collator asks for."""

    model_input_names = ("input_ids", "attention_mask")

    def pad(self, features: list[dict[str, Any]], **options: Any) -> dict[str, torch.Tensor]:
        return {key: torch.tensor([feature[key] for feature in features]) for key in features[0]}


def read_all() -> Any:
    yield from rows(32)


LLAMA = ("llama-tied", "ForCausalLM")
TWICE_EVALUATED = {"eval_strategy": "steps", "eval_steps": 3}
TWICE_SAVED = {"save_strategy": "steps", "save_steps": 3}
FIELDS = [
    Row("output_dir, max_steps, per_device_train_batch_size, per_device_eval_batch_size, learning_rate, logging_steps, "
        "report_to, use_cpu, disable_tqdm, save_strategy", SAME, "The settings of all rows here. Stages have folders "
        "of their own in output_dir: `stage-S/checkpoint-N`."),
    Row("num_train_epochs", SAME, "Of each stage, unless stage_epochs or stage_steps says so. The default, -1, is "
        "3, of fewer than 10,000 examples as many passes as see 30,000, at most 20.",
        {"num_train_epochs": 2.0, "max_steps": -1}),
    Row("lr_scheduler_type, lr_scheduler_kwargs, warmup_steps", SAME, "Each stage has a schedule of its own. By "
        "default the rate grows in the first tenth of it.",
        {"lr_scheduler_type": "cosine", "lr_scheduler_kwargs": {"num_cycles": 0.3}, "warmup_steps": 2}),
    Row("optim, optim_args", SAME, "Each stage has an optimizer of its own. `galore_*`, `apollo_*`, `lomo` and "
        "`adalomo` are refused: see below.", {"optim": "sgd", "optim_args": "momentum=0.9"}),
    Row("weight_decay, adam_beta1, adam_beta2, adam_epsilon", SAME, "",
        {"weight_decay": 0.1, "adam_beta1": 0.8, "adam_beta2": 0.9, "adam_epsilon": 1e-4}),
    Row("optim_target_modules", SAME, "Only optimizers that are refused read it.",
        {"optim_target_modules": ["query"]}),
    Row("max_grad_norm", SAME, "", {"max_grad_norm": 0.01}),
    Row("gradient_accumulation_steps", SAME, "A language model's loss is a mean over all tokens of the step. A mean "
        "over sentences (classifiers) is divided by the number of micro-batches; see below.",
        {"gradient_accumulation_steps": 3, "max_steps": -1, "num_train_epochs": 1}, model=LLAMA),
    Row("average_tokens_across_devices", SAME, "", {"average_tokens_across_devices": False}, model=LLAMA),
    Row("label_smoothing_factor", SAME, "", {"label_smoothing_factor": 0.1}),
    Row("bf16, bf16_full_eval", SAME, "Weights stay in fp32 while they train; sums are rounded in another order.",
        {"bf16": True}),
    Row("fp16, fp16_full_eval", UNUSED, "For GPUs.", {"fp16": True}),
    Row("tf32", SAME, "", {"tf32": False}),
    Row("gradient_checkpointing, gradient_checkpointing_kwargs", SAME, "",
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}),
    Row("activation_checkpointing, activation_checkpointing_kwargs", SAME, "",
        {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": True}}),
    Row("torch_compile, torch_compile_backend, torch_compile_mode", SAME, "A graph for each size that is drawn.",
        {"torch_compile": True, "torch_compile_backend": "eager"}),
    Row("use_cache", SAME, "", {"use_cache": True}),
    Row("neftune_noise_alpha", SAME, "", {"neftune_noise_alpha": 5.0}),
    Row("torch_empty_cache_steps", SAME, "After each step, all its sizes together.", {"torch_empty_cache_steps": 2}),
    Row("auto_find_batch_size", SAME, "", {"auto_find_batch_size": True}),
    Row("logging_strategy, logging_first_step", SAME, "Logs have the stage too, and the mean losses of full size, "
        "smallest and the rest.", {"logging_strategy": "epoch", "max_steps": -1, "num_train_epochs": 2}),
    Row("logging_nan_inf_filter", SAME, "A loss that is not finite ends the run, whatever is filtered from logs.",
        {"logging_nan_inf_filter": False}),
    Row("include_num_input_tokens_seen", SAME, "A batch is counted once, however many sizes see it.",
        {"include_num_input_tokens_seen": "all"}),
    Row("log_level, log_level_replica, log_on_each_node", SAME, "", {"log_level": "error"}),
    Row("run_name, project, trackio_space_id, trackio_bucket_id, trackio_static_space_id", UNUSED,
        "Names for services that keep logs.", {"run_name": "a name"}),
    Row("eval_strategy, eval_steps, eval_delay", SAME, "Every size of the palette is evaluated; eval_loss and other "
        "metrics without a name are means over them. What is learned does not depend on the palette.",
        {**TWICE_EVALUATED, "eval_delay": 2}),
    Row("eval_on_start", SAME, "", {"eval_on_start": True}),
    Row("prediction_loss_only", SAME, "", {**TWICE_EVALUATED, "prediction_loss_only": True},
        lambda: {"compute_metrics": accuracy}),
    Row("eval_do_concat_batches, eval_accumulation_steps, eval_use_gather_object", SAME, "",
        {**TWICE_EVALUATED, "eval_accumulation_steps": 1, "eval_use_gather_object": True},
        lambda: {"compute_metrics": accuracy}),
    Row("include_for_metrics", SAME, "", {**TWICE_EVALUATED, "include_for_metrics": ["inputs", "loss"]},
        lambda: {"compute_metrics": with_inputs}),
    Row("batch_eval_metrics", SAME, "", {**TWICE_EVALUATED, "batch_eval_metrics": True, "include_for_metrics": []},
        lambda: {"compute_metrics": by_batches}),
    Row("save_steps, save_total_limit, save_only_model, save_on_each_node", SAME,
        "Of each stage; a stage that is done is kept besides.", {**TWICE_SAVED, "save_total_limit": 1}),
    Row("load_best_model_at_end, metric_for_best_model, greater_is_better", SAME,
        "Of each stage; later ones go on from it. Metrics are means over the palette, or `SIZE_METRIC` of one size.",
        {**TWICE_EVALUATED, **TWICE_SAVED, "load_best_model_at_end": True, "metric_for_best_model": "accuracy",
         "greater_is_better": False}, lambda: {"compute_metrics": accuracy}),
    Row("enable_jit_checkpoint", SAME, "", {"enable_jit_checkpoint": True}),
    Row("hub_token, hub_private_repo, hub_model_id, hub_strategy, hub_always_push, hub_revision", UNUSED,
        "Read with push_to_hub only, which is refused.", {"hub_model_id": "a/name"}),
    Row("ignore_data_skip, restore_callback_states_from_checkpoint, resume_from_checkpoint", SAME,
        "See resuming, below.", {"restore_callback_states_from_checkpoint": True}, lambda: {"callbacks": [Counts()]}),
    Row("full_determinism", SAME, "", {"full_determinism": True}),
    Row("seed, data_seed", SAME, "Stage S is seeded with seed + S, so that it runs the same after resuming.",
        {"seed": 7, "data_seed": 5}),
    Row("accelerator_config", SAME, "", {"accelerator_config": {"split_batches": True}}),
    Row("dataloader_drop_last", SAME, "", 
        {"dataloader_drop_last": True, "per_device_train_batch_size": 5, "max_steps": 7}),
    Row("dataloader_num_workers, dataloader_persistent_workers, dataloader_prefetch_factor, dataloader_in_order, "
        "dataloader_multiprocessing_context", SAME, "", {"dataloader_num_workers": 1, "dataloader_prefetch_factor": 3,
        "dataloader_persistent_workers": True, "dataloader_multiprocessing_context": "fork"}),
    Row("dataloader_pin_memory", OWN, "Off where there is no GPU: it would only warn."),
    Row("remove_unused_columns", SAME, "", {"remove_unused_columns": True},
        lambda: {"train_dataset": rows(32).add_column("note", ["n"] * 32)}),
    Row("label_names", SAME, "", {**TWICE_EVALUATED, "label_names": ["labels"]}, lambda: {"compute_metrics": accuracy}),
    Row("train_sampling_strategy, length_column_name", SAME, "",
        {"train_sampling_strategy": "group_by_length", "length_column_name": "size"},
        lambda: {"train_dataset": rows(32).add_column("size", list(range(32)))}),
    Row("ddp_find_unused_parameters, ddp_bucket_cap_mb, ddp_broadcast_buffers, ddp_static_graph, ddp_backend, "
        "ddp_timeout, local_rank", UNUSED, "Gradients are averaged once a step, after all its sizes.",
        {"ddp_bucket_cap_mb": 5}),
    Row("debug, skip_memory_metrics", SAME, "", {"debug": "underflow_overflow"}),
    Row("do_train, do_eval, do_predict", SAME, "For scripts; Trainer does not read them.", {"do_train": True}),
    Row("liger_kernel_config, fsdp_config", UNUSED, "Read with options only that are refused."),
    Row("fsdp", REFUSED, "A subnet reads slices of whole weights; they would be in pieces.", {"fsdp": "full_shard"}),
    Row("deepspeed", REFUSED, "The same.", {"deepspeed": {"zero_optimization": {"stage": 2}}}),
    Row("parallelism_config", REFUSED, "The same.", {"parallelism_config": object()}),
    Row("use_liger_kernel", REFUSED, "It would take the place of elastic layers, which have kernels of their own.",
        {"use_liger_kernel": True}),
    Row("push_to_hub", REFUSED, "A checkpoint of a stage is no model that transformers loads: upload the run's folder "
        "with `hf upload`, or an exported size.", {"push_to_hub": True}),
]  # fmt: skip
OPTIMIZERS = [
    Row(f"optim={name}", REFUSED, why, {"optim": name})
    for name, why in (
        ("galore_adamw", "It projects gradients of whole weights; low-rank stages train."),
        ("apollo_adamw", "The same."),
        ("lomo", "It updates during the backward pass, before all sizes have added their gradients."),
        ("adalomo", "The same."),
    )
]
ARGUMENTS = [
    Row("model", SAME, "A SuperTransformer, or a model to make one of. Needed: there is no model_init."),
    Row("args", SAME, "MLFSArguments: all of TrainingArguments, and the method's own; by default MLFSArguments()."),
    Row("train_dataset", SAME, "A data set, or a stream (with max_steps or stage_steps), shuffled as by Trainer.", {},
        lambda: {"train_dataset": IterableDataset.from_generator(read_all)}),
    Row("eval_dataset", SAME, "Of several sets (a dict) each is evaluated by itself: `eval_SET_SIZE_METRIC`.",
        TWICE_EVALUATED, lambda: {"eval_dataset": rows(8, 5)}),
    Row("data_collator", SAME, "", {}, lambda: {"data_collator": DataCollatorWithPadding(Tokenizer())}),
    Row("compute_loss_func", SAME, "Every size's task loss; also where units are ranked.", {},
        lambda: {"compute_loss_func": own_loss}),
    Row("compute_metrics", SAME, "Of each size.", TWICE_EVALUATED, lambda: {"compute_metrics": accuracy}),
    Row("preprocess_logits_for_metrics", SAME, "", TWICE_EVALUATED,
        lambda: {"compute_metrics": accuracy, "preprocess_logits_for_metrics": scaled}),
    Row("callbacks", SAME, "Each stage is a run to them: events of training come once a stage, and "
        "`state.global_step` counts its steps, as names of checkpoints do; in `on_log` alone, and in logs, steps count "
        "on through the stages. A callback that sets `should_training_stop` ends the run; with stop_ends=stage, "
        "the stage (early stopping may end each).", {}, lambda: {"callbacks": [Stops()]}),
    Row("optimizer_cls_and_kwargs", SAME, "", {},
        lambda: {"optimizer_cls_and_kwargs": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.5})}),
    Row("processing_class", SAME, "Saved with the run; read by `mlfs eval` and `mlfs export`."),
    Row("optimizers", REFUSED, "Every stage makes its own: take the options, or optimizer_cls_and_kwargs.", {},
        lambda: {"optimizers": (torch.optim.SGD([torch.zeros(1, requires_grad=True)]), None)}),
    Row("model_init", REFUSED, "Stages go on with one model.", {}, lambda: {"model_init": make}),
]  # fmt: skip
RESUMING = [
    Row("train(resume_from_checkpoint=True)", SAME, "From the last whole checkpoint; stages that are done are read.",
        TWICE_SAVED),
    Row("ignore_data_skip", SAME, "", {**TWICE_SAVED, "ignore_data_skip": True}),
    Row("restore_callback_states_from_checkpoint", SAME, "",
        {**TWICE_SAVED, "restore_callback_states_from_checkpoint": True}, lambda: {"callbacks": [Counts()]}),
    Row("load_best_model_at_end", SAME, "The best is remembered.",
        {**TWICE_SAVED, **TWICE_EVALUATED, "load_best_model_at_end": True}),
]  # fmt: skip
METHODS = [
    Row("train", SAME, "All stages, one after the other; it returns steps of all and the loss of the last."),
    Row("evaluate, predict", SAME, "`evaluate` returns `eval_SIZE_METRIC` of each size, and `eval_METRIC`, their mean; "
        "`predict` runs the size that is active."),
    Row("save_model, save_state, create_model_card, log_metrics, save_metrics, metrics_format", SAME,
        "`save_model` writes the super-transformer, without its base."),
    Row("add_callback, pop_callback, remove_callback", SAME),
    Row("hyperparameter_search", REFUSED, "Train once per setting."),
    Row("push_to_hub", REFUSED, "See push_to_hub, above."),
    Row("any method that is overridden", SAME, "It is called with the arguments, positional and by name, that Trainer "
        "calls it with. `training_step` runs all sizes of a step; `compute_loss` once for each of them."),
]  # fmt: skip
LOSSES = [
    Row("a mean over sentences (BERT's classes), accumulated over n micro-batches", OWN,
        "It is divided by n. Trainer adds the n means up where the model's `forward` takes further arguments, so that "
        "gradients and logged losses are n times those of one large batch."),
]  # fmt: skip


def text() -> str:
    """The page, written from the rows."""
    heads = ("option", "MLFSTrainer does", "notes")
    cells = lambda rows: [(row.asked, row.does, row.why) for row in rows]  # noqa: E731
    return page.page(
        f"""
# The contract with Trainer
`MLFSTrainer` is a `transformers.Trainer`. For every option of `TrainingArguments`, argument and method of `Trainer`
this says what it does. "{SAME}" is tested: stage 0 and `Trainer` train one super-transformer at full size from the same
weights, data and seed, and end with the same bits (in bf16: to rounding), the same logs and the same calls of
callbacks. "{UNUSED}" is handed to Trainer unchanged, and needs what the tests have not: GPUs, several machines,
services. Stages 1 and 2 are runs of the same kind, of several sizes a step.

Encoders that run fused skip the padding of a batch (`mlfs.without_padding`): with dropout they draw other masks than
Trainer's model would, and what `predict` gives at padded positions is nobody's business and differs.
""",
        [
            ("Options", heads, cells(FIELDS + OPTIMIZERS)),
            ("Arguments", ("argument", *heads[1:]), cells(ARGUMENTS)),
            ("Resuming", ("asked", *heads[1:]), cells(RESUMING)),
            ("Losses", ("loss", *heads[1:]), cells(LOSSES)),
            ("Methods", ("method", *heads[1:]), cells(METHODS)),
        ],
        "tests.contracts.trainer_rows",
    )


if __name__ == "__main__":
    page.write("trainer", text())
