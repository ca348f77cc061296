"""What the subnets of a step have in common: the batch, and what its losses are divided by."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mlfs.elastic.linear import ElasticLinear
from mlfs.ops.head_loss import IGNORED
from mlfs.training.task import Task


@dataclass(frozen=True)
class Accumulation:
    """What a loss is divided by, so that the gradients of several batches and processes add up to those of one batch.

    Attributes:
        num_items: labels that count in all accumulated batches; None where the Trainer did not count them.
        is_scaled: whether the task loss is its share of the accumulated batches already.
        divisor: what is left to divide a loss by: 1 if it is such a share, else the number of these batches.
        processes: over which gradients are averaged, where `num_items` counts the labels of all of them; else 1.
        batches: how many are accumulated.
    """

    num_items: Tensor | int | None
    is_scaled: bool
    divisor: int
    processes: int
    batches: int = 1

    def items(self, targets: Tensor) -> Any:
        """Returns what a sum over the labels of a batch is divided by, to be a loss such as the model's own."""
        if not self.is_scaled or self.num_items is None:
            return targets.ne(IGNORED).sum().clamp_min(1)
        return torch.as_tensor(self.num_items).clamp_min(1) / self.processes

    def share(self, targets: Tensor | None) -> Tensor | float:
        """Returns what a mean over a batch is multiplied by, to be on the scale of the task loss."""
        if not self.is_scaled:
            return 1.0
        if self.num_items is None or targets is None:  # a loss that says it is a share, of what nobody has counted
            return 1 / self.batches
        return targets.ne(IGNORED).sum() / self.items(targets)


def accumulation_of(trainer: Any, num_items: Tensor | int | None) -> Accumulation:
    """Finds what the losses of a batch are divided by: what `transformers.Trainer.training_step` does.

    Args:
        num_items: labels that count in all accumulated batches, where the Trainer has counted them.
    """
    is_scaled = getattr(trainer, "loss_is_scaled_for_ga", None)
    if is_scaled is None:
        is_told = trainer.model_accepts_loss_kwargs and num_items is not None
        is_scaled = is_told or trainer.compute_loss_func is not None
    batches, processes = trainer.current_gradient_accumulation_steps, 1
    if trainer.args.average_tokens_across_devices:
        # the Trainer has counted the items of all processes
        processes = trainer.accelerator.num_processes
    return Accumulation(num_items, is_scaled, 1 if is_scaled else batches, processes, batches)


@dataclass(frozen=True)
class Batch:
    """One batch of a step, the same for all of its subnets.

    Attributes:
        inputs: of the model, on its device, with labels.
        accumulation: what its losses are divided by.
        head: the LM head, if the loss is computed from what goes into it; None if the model makes logits.
        smoothing: label smoothing of the loss from what goes into the head, 0 to 1.
        unlabelled: whether no label counts, a bool scalar; None where every label does. The loss is zero then, as that
            of the batch's share of a larger one would be: a mean over no label would be NaN.
        own_loss: whether the loss is somebody's own: its function is called with nothing but the batch.
        task: what its outputs are, where the labels decide; None for what the configuration says.
    """

    inputs: Mapping[str, Any]
    accumulation: Accumulation
    head: ElasticLinear | None = None
    smoothing: float = 0.0
    unlabelled: Tensor | None = None
    own_loss: bool = False
    task: Task | None = None
