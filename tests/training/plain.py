"""A plain `transformers.Trainer` of what an `MLFSTrainer` trains in stage 0, and what both do in a step."""

import copy
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

from mlfs import MLFSTrainer
from tests.trainers import trainer

# One step of stage 0 with the data in order, whose gradients are neither clipped nor random.
ONE_STEP: dict[str, Any] = {
    "stages_to_train": [0], "stage_steps": [1], "save_strategy": "no", "dropout_stages": [], "max_grad_norm": 0.0,
    "train_sampling_strategy": "sequential",
}  # fmt: skip


class Gradients(TrainerCallback):
    """Keeps the gradients of each step."""

    def __init__(self) -> None:
        self.steps: list[dict[str, torch.Tensor]] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        self.steps.append({n: p.grad.detach().clone() for n, p in model.named_parameters() if p.grad is not None})


def mlfs_and_plain(
    folder: Path, name: str, suffix: str, mixin: type | None = None, **options: Any
) -> tuple[MLFSTrainer, Trainer]:
    """Makes both trainers of copies of one super-transformer, whose stage 0 trains without dropout.

    Args:
        mixin: overrides methods in both, as a user's subclass would.
        **options: of `tests.trainers.trainer`; compute_loss_func is given to both.
    """
    func = options.pop("compute_loss_func", None)
    mixins = () if mixin is None else (mixin,)
    base = trainer(folder / "made", name, suffix, **{**ONE_STEP, **options})
    plain_model = copy.deepcopy(base.supernet.model).eval()
    ours = type("Own", (*mixins, MLFSTrainer), {})(
        base.supernet, base.args, train_dataset=base.train_dataset, eval_dataset=base.eval_dataset,
        compute_loss_func=func,
    )  # fmt: skip
    ours.supernet.train_stage(0)
    args = TrainingArguments(
        **{key: getattr(base.args, key) for key in (
            "report_to", "use_cpu", "disable_tqdm", "per_device_train_batch_size", "per_device_eval_batch_size",
            "learning_rate", "logging_steps", "save_strategy", "max_grad_norm", "train_sampling_strategy",
            "gradient_accumulation_steps", "label_smoothing_factor", "remove_unused_columns", "label_names",
            "length_column_name", "dataloader_drop_last",
        )},
        output_dir=str(folder / "plain"),
        max_steps=base.args.of_stage("stage_steps", 0, -1), dataloader_pin_memory=False,
    )  # fmt: skip
    plain_model.train = lambda mode=True: plain_model  # without dropout
    plain = type("Own", (*mixins, Trainer), {})(
        plain_model, args, train_dataset=base.train_dataset, eval_dataset=base.eval_dataset, compute_loss_func=func
    )
    return ours, plain


def gradients_of(t: Trainer) -> list[dict[str, torch.Tensor]]:
    """Trains, and returns the gradients of each step."""
    gradients = Gradients()
    t.add_callback(gradients)
    t.train()
    return gradients.steps


def assert_close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], factor: float = 1.0) -> None:
    """Compares gradients, but for rounding."""
    assert found.keys() == expected.keys() and found
    for key, gradient in expected.items():
        torch.testing.assert_close(found[key], gradient * factor, rtol=1e-4, atol=1e-6)
