"""How the subnets of a step run, found by the name that `subnet_execution` takes: forward passes, losses, backward."""

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from mlfs.models.fused.lm_head import without_logits
from mlfs.models.fused.padding import reads_no_padding, without_padding
from mlfs.space.subnet import Subnet
from mlfs.supernet.model import SuperTransformer
from mlfs.training.batch import Batch
from mlfs.training.distillation import detached
from mlfs.training.lockstep import ComputedOutputs, part_of, repeat, rows_of
from mlfs.training.losses import LossOfSubnet, SubnetLoss


class SubnetRunner(Protocol):
    """What the executions use of a `SubnetTrainer`."""

    supernet: SuperTransformer
    args: Any
    accelerator: Any

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Computes the task loss, as `transformers.Trainer` does."""

    def compute_loss_context_manager(self) -> Any:
        """Enters the precision of the forward pass."""


class Execution(Protocol):
    """Runs every subnet of a step forward and backward."""

    def __call__(
        self,
        trainer: SubnetRunner,
        subnet_loss: SubnetLoss,
        model: nn.Module,
        batch: Batch,
        subnets: list[Subnet],
        weights: list[float],
    ) -> list[LossOfSubnet]:
        """Adds the gradients of the weighted losses to those of the parameters.

        Args:
            trainer: whose `compute_loss`, precision and backward pass are used.
            model: as the Trainer hands it over: the super-transformer's, or wrapped.
            subnets: maxnet first: it is the teacher of the others.
            weights: of their losses.

        Returns:
            The loss of each subnet, without its graph and not yet weighted.
        """


def one_by_one(
    trainer: SubnetRunner,
    subnet_loss: SubnetLoss,
    model: nn.Module,
    batch: Batch,
    subnets: list[Subnet],
    weights: list[float],
) -> list[LossOfSubnet]:
    """Runs one subnet after the other; see `Execution`."""
    teacher, losses = None, []
    packs = reads_no_padding(batch.inputs)
    needs_states = len(subnets) > 1 and subnet_loss.distance.is_used
    for subnet, weight in zip(subnets, weights, strict=True):
        # the backward pass may recompute: it stays inside
        with trainer.supernet.activate(subnet):
            with trainer.compute_loss_context_manager(), without_padding(packs):
                task_loss, outputs = _forward(trainer, model, batch, needs_states)
                found = subnet_loss(batch, subnet, outputs, task_loss, teacher)
            if teacher is None:
                teacher = detached(outputs)
            trainer.accelerator.backward(found.loss * (weight / batch.accumulation.divisor))
        losses.append(LossOfSubnet(found.loss.detach(), found.parts))
    return losses


def lockstep(
    trainer: SubnetRunner,
    subnet_loss: SubnetLoss,
    model: nn.Module,
    batch: Batch,
    subnets: list[Subnet],
    weights: list[float],
) -> list[LossOfSubnet]:
    """Runs all subnets together through each layer, each on its own copy of the batch's rows; see `Execution`."""
    teacher, losses = None, []
    total = torch.zeros((), device=trainer.args.device)
    rows = rows_of(batch.inputs)
    subnet_of_row = [subnet for subnet in subnets for _ in range(rows)]
    with trainer.supernet.activate_rows(subnet_of_row):
        with trainer.compute_loss_context_manager():
            together = _forward_together(model, batch, len(subnets), subnet_loss.distance.is_used)
            for i, (subnet, weight) in enumerate(zip(subnets, weights, strict=True)):
                outputs: Any = part_of(together, i, rows, subnet)
                task_loss = None
                if batch.head is None:
                    computed = ComputedOutputs(trainer.accelerator.unwrap_model(model), outputs)
                    task_loss, outputs = _compute_loss(trainer, computed, dict(batch.inputs), batch)
                found = subnet_loss(batch, subnet, outputs, task_loss, teacher)
                if teacher is None:
                    teacher = detached(outputs)
                total = total + found.loss * weight
                losses.append(LossOfSubnet(found.loss.detach(), found.parts))
        trainer.accelerator.backward(total / batch.accumulation.divisor)
    return losses


EXECUTIONS: dict[str, Execution] = {"sequential": one_by_one, "lockstep": lockstep}


def _forward(
    trainer: SubnetRunner, model: nn.Module, batch: Batch, needs_states: bool
) -> tuple[Tensor | None, Mapping[str, Any]]:
    """Runs the active subnet: (task loss, or None where it is computed from what goes into the head; outputs)."""
    inputs = dict(batch.inputs)
    if needs_states:
        inputs["output_hidden_states"] = True
    if batch.head is not None:
        return None, without_logits(model, batch.head, inputs)
    return _compute_loss(trainer, model, inputs, batch)


def _forward_together(model: nn.Module, batch: Batch, count: int, needs_states: bool) -> Mapping[str, Any]:
    """Runs the rows of the batch `count` times over; returns outputs without a loss."""
    inputs = repeat(batch.inputs, count)
    if needs_states:
        inputs["output_hidden_states"] = True
    if batch.head is not None:
        return without_logits(model, batch.head, inputs)
    outputs: Mapping[str, Any] = model(**inputs)
    return outputs


def _compute_loss(
    trainer: SubnetRunner, model: nn.Module, inputs: dict[str, Any], batch: Batch
) -> tuple[Tensor, Mapping[str, Any]]:
    """Computes the task loss as the Trainer, or the user's subclass of it, does: (loss, outputs)."""
    items = batch.accumulation.num_items
    found: Any = trainer.compute_loss(model, inputs, return_outputs=True, num_items_in_batch=items)
    return found
