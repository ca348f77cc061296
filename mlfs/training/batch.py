"""What the subnets of a step have in common: the batch, and what its losses are divided by."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from mlfs.elastic.linear import ElasticLinear
from mlfs.ops.head_loss import IGNORED


@dataclass(frozen=True)
class Accumulation:
    """What a loss is divided by, so that the gradients of several batches and processes add up to those of one batch.

    Attributes:
        num_items: labels that count in all accumulated batches; None where the Trainer did not count them.
        is_scaled: whether the model's loss is divided by `num_items` already.
        divisor: what is left to divide a loss by: 1 if it is its share of the accumulated batches already, else the
            number of these.
        processes: over which gradients are averaged, where `num_items` counts the labels of all of them; else 1.
    """

    num_items: Tensor | int | None
    is_scaled: bool
    divisor: int
    processes: int

    def items(self, targets: Tensor) -> Any:
        """Returns what a sum over the labels of a batch is divided by, to be a loss such as the model's own."""
        if not self.is_scaled:
            return targets.ne(IGNORED).sum()
        assert self.num_items is not None
        return self.num_items / self.processes

    def share(self, targets: Tensor | None) -> Tensor | float:
        """Returns what a mean over a batch is multiplied by, to be on the scale of the model's loss."""
        if not self.is_scaled:
            return 1.0
        assert targets is not None
        return targets.ne(IGNORED).sum() / self.items(targets)


@dataclass(frozen=True)
class Batch:
    """One batch of a step, the same for all of its subnets.

    Attributes:
        inputs: of the model, on its device, with labels.
        accumulation: what its losses are divided by.
        head: the LM head, if the loss is computed from what goes into it; None if the model makes logits.
        smoothing: label smoothing of the loss from what goes into the head, 0 to 1.
    """

    inputs: Mapping[str, Any]
    accumulation: Accumulation
    head: ElasticLinear | None = None
    smoothing: float = 0.0
