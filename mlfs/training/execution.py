"""How the subnets of a step run, found by the name that `subnet_execution` takes: forward passes, losses, backward."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from mlfs.errors import MLFSError
from mlfs.models.fused.lm_head import without_logits
from mlfs.models.fused.padding import heads_read_no_padding, reads_no_padding, without_padding
from mlfs.space.subnet import Subnet
from mlfs.supernet.model import SuperTransformer
from mlfs.training.batch import Batch
from mlfs.training.inputs import LABELS, without_labels
from mlfs.training.lockstep import ComputedOutputs, part_of, repeat, rows_of
from mlfs.training.losses import LossOfSubnet, SubnetLoss
from mlfs.training.teacher import FrozenTeacher


class SubnetRunner(Protocol):
    """What the executions use of a `SubnetTrainer`."""

    supernet: SuperTransformer
    args: Any
    accelerator: Any
    label_names: Any
    teacher: FrozenTeacher | None

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
            subnets: maxnet first: it is the teacher of the others, where the trainer has no frozen one.
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
    losses = []
    packs = reads_no_padding(batch.inputs) and heads_read_no_padding(trainer.supernet.model)
    has_students = len(subnets) > 1 or trainer.teacher is not None
    needs_states = has_students and subnet_loss.distance.is_used
    with trainer.accelerator.autocast(), without_padding(packs):
        teacher = _taught_by(trainer, subnet_loss, batch, needs_states)
    for subnet, weight in zip(subnets, weights, strict=True):
        layers = trainer.supernet.kept_layers(subnet)
        # the backward pass may recompute: it stays inside
        with trainer.supernet.activate(subnet):
            with trainer.compute_loss_context_manager(), without_padding(packs):
                task_loss, outputs = _forward(trainer, model, batch, needs_states, has_students)
                found = subnet_loss(batch, layers, outputs, task_loss, teacher)
            if teacher is None and has_students:
                teacher = subnet_loss.teacher(batch, outputs)
            trainer.accelerator.backward(found.loss * (weight / batch.accumulation.divisor))
        losses.append(LossOfSubnet(found.loss.detach(), found.parts))
    return losses


def without_dropout(model: nn.Module) -> None:
    """Sets the modules of a model that trains as in evaluation, but those that recompute activations."""
    for module in model.modules():
        # these ask `training` whether to
        if not hasattr(module, "gradient_checkpointing"):
            module.training = False


def lockstep(
    trainer: SubnetRunner,
    subnet_loss: SubnetLoss,
    model: nn.Module,
    batch: Batch,
    subnets: list[Subnet],
    weights: list[float],
) -> list[LossOfSubnet]:
    """Runs all subnets together through each layer, each on its own copy of the batch's rows; see `Execution`."""
    losses = []
    total = torch.zeros((), device=trainer.args.device)
    rows = rows_of(batch.inputs)
    subnet_of_row = [subnet for subnet in subnets for _ in range(rows)]
    needs_states = subnet_loss.distance.is_used
    with trainer.accelerator.autocast():
        teacher = _taught_by(trainer, subnet_loss, batch, needs_states)
    with trainer.supernet.activate_rows(subnet_of_row):
        with trainer.compute_loss_context_manager():
            given = _without_labels(trainer, batch)
            together = _forward_together(model, given, batch, len(subnets), needs_states)
            for i, (subnet, weight) in enumerate(zip(subnets, weights, strict=True)):
                sizes = trainer.supernet.layer_sizes(subnet)
                outputs: Any = part_of(together, i, rows, sizes)
                task_loss = None
                if batch.head is None:
                    whole = trainer.accelerator.unwrap_model(model)
                    computed = ComputedOutputs(whole, outputs, given)
                    task_loss, outputs = _compute_loss(trainer, computed, dict(batch.inputs), batch)
                    _checked(outputs, needs_states)
                found = subnet_loss(batch, sizes.layers, outputs, task_loss, teacher)
                if teacher is None:
                    teacher = subnet_loss.teacher(batch, outputs)
                total = total + found.loss * weight
                losses.append(LossOfSubnet(found.loss.detach(), found.parts))
        trainer.accelerator.backward(total / batch.accumulation.divisor)
    return losses


EXECUTIONS: dict[str, Execution] = {"sequential": one_by_one, "lockstep": lockstep}


def _taught_by(
    trainer: SubnetRunner, subnet_loss: SubnetLoss, batch: Batch, needs_states: bool
) -> Mapping[str, Any] | None:
    """Asks the frozen teacher; None where there is none, so that maxnet teaches the others."""
    if trainer.teacher is None:
        return None
    given = _without_labels(trainer, batch)
    return subnet_loss.teacher(batch, trainer.teacher(given, needs_states, batch.head is not None))


def _forward(
    trainer: SubnetRunner, model: nn.Module, batch: Batch, needs_states: bool, has_students: bool
) -> tuple[Tensor | None, Mapping[str, Any]]:
    """Runs the active subnet: (task loss, or None where it is computed from what goes into the head; outputs)."""
    inputs = dict(batch.inputs)
    if batch.own_loss:
        if not has_students:  # as the Trainer asks for a loss: without outputs
            items = batch.accumulation.num_items
            return trainer.compute_loss(model, inputs, num_items_in_batch=items), {}
        with _reporting_states(trainer.supernet.model, needs_states):
            loss, outputs = _compute_loss(trainer, model, inputs, batch)
        return loss, _checked(outputs, needs_states)
    if needs_states:
        inputs["output_hidden_states"] = True
    if batch.head is not None:
        return None, without_logits(model, batch.head, inputs)
    return _compute_loss(trainer, model, inputs, batch)


@contextmanager
def _reporting_states(model: PreTrainedModel, wanted: bool) -> Iterator[None]:
    """Has a model report hidden states to a loss of somebody's own, which calls it with what it likes."""
    before = model.config.output_hidden_states
    model.config.output_hidden_states = wanted or before
    try:
        yield
    finally:
        model.config.output_hidden_states = before


def _checked(outputs: Any, needs_states: bool) -> Mapping[str, Any]:
    """Returns outputs that subnets can learn from.

    Raises:
        MLFSError: they are no mapping, or without hidden states that are to be compared.
    """
    if not isinstance(outputs, Mapping):
        raise MLFSError(
            f"compute_loss returned outputs that are a {type(outputs).__name__}: subnets learn from the model's output "
            "as it is, with names; return that, and leave return_dict alone"
        )
    if needs_states and outputs.get("hidden_states") is None:
        raise MLFSError(
            "compute_loss returned outputs without hidden_states, which subnets learn from: return the model's output "
            "as it is, or set distill_beta to 0"
        )
    return outputs


def _without_labels(trainer: SubnetRunner, batch: Batch) -> dict[str, Any]:
    """Returns what of a batch the model is to be called with; its loss comes later."""
    if batch.own_loss:
        return without_labels(trainer.supernet.model, batch.inputs, trainer.label_names)
    return {name: value for name, value in batch.inputs.items() if name not in LABELS}


def _forward_together(
    model: nn.Module, given: Mapping[str, Any], batch: Batch, count: int, needs_states: bool
) -> Mapping[str, Any]:
    """Runs the rows of the batch `count` times over; returns outputs without a loss."""
    inputs = repeat(given, count)
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
