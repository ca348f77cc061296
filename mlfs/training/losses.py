"""The loss of a subnet (arXiv 2404.01353, section 3): its task's, and what it learns from maxnet, its teacher:

L_j = (1 - α) task_j + α KL(maxnet || j) + Σ_l β_{g(l)} feature_{j,l}

A model that gives no logits has no KL to share with: L_j = task_j + Σ_l β_{g(l)} feature_{j,l}.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mlfs.models.fused.lm_head import HEAD_INPUT
from mlfs.ops.head_loss import head_loss
from mlfs.training.batch import Batch
from mlfs.training.distillation import HiddenStateDistance, detached
from mlfs.training.distributed import average
from mlfs.training.task import Task

# What a teacher says beside its outputs, across processes: this process's share of each layer's size times their
# number, and the mean of their shares of the step.
LAYER_SHARES, SHARE = "layer_shares", "share"


class LossOfSubnet(NamedTuple):
    """A loss, with its graph, and the parts of it that are logged, without."""

    loss: Tensor
    parts: dict[str, Tensor]


class SubnetLoss:
    """L_j of the formula above, from logits or from what goes into the LM head.

    Args:
        task: what kind of outputs the model has.
        distance: of the hidden states.
        alpha: α, the share of the divergence, 0 to 1.
        temperature: of the divergence.
        processes: over which gradients are averaged.
    """

    def __init__(
        self, task: Task, distance: HiddenStateDistance, alpha: float, temperature: float, processes: int = 1
    ) -> None:
        self.task, self.distance = task, distance
        self.alpha, self.temperature, self.processes = alpha, temperature, processes

    def __call__(
        self,
        batch: Batch,
        layers: Sequence[int],
        outputs: Mapping[str, Any],
        task_loss: Tensor | None = None,
        teacher: Mapping[str, Any] | None = None,
    ) -> LossOfSubnet:
        """Computes the loss of one subnet.

        Args:
            layers: those that it keeps.
            outputs: what the model gave at its size: with logits, or, where the batch has a head, with
                HEAD_INPUT; with hidden_states where there is a teacher and `distance.is_used`.
            task_loss: scalar; None where the batch has a head: it is computed from what goes into that.
            teacher: maxnet's outputs, without their graph. None for maxnet itself, whose loss is its task's alone.
        """
        share = 1.0 if teacher is None else self._share(batch)
        if batch.head is not None:
            loss, parts = self._from_head_input(batch, outputs, teacher)
        else:
            assert task_loss is not None
            loss, parts = self._from_logits(batch, outputs, task_loss, teacher, share)
        if teacher is not None and self.distance.is_used:
            share = teacher.get(SHARE, share)
            distance = self.distance(
                layers, outputs, teacher, batch.inputs.get("attention_mask"), teacher.get(LAYER_SHARES)
            )
            feature = share * distance
            loss = loss + feature
            parts["feature"] = feature.detach()
        parts["loss"] = loss.detach()
        if batch.unlabelled is not None:
            loss, parts = _zero_if_unlabelled(batch.unlabelled, loss, parts, task_loss)
        return LossOfSubnet(loss, parts)

    def teacher(self, batch: Batch, outputs: Mapping[str, Any]) -> dict[str, Any]:
        """Returns what maxnet's outputs have to say to the other subnets: constants.

        Across processes, the distance of a layer is relative to the teacher's size in all of their batches: this
        process's share of each layer's, and of the step, is among them.
        """
        teacher = detached(outputs)
        if self.distance.is_used and self.processes > 1:
            sizes = self.distance.sizes(teacher, batch.inputs.get("attention_mask"))
            share = torch.as_tensor(self._share(batch), dtype=sizes.dtype, device=sizes.device)
            own = torch.cat([sizes, share.reshape(1)])
            of_all = average(own, self.processes)
            teacher[LAYER_SHARES] = sizes / of_all[:-1].clamp_min(torch.finfo(sizes.dtype).tiny)
            teacher[SHARE] = of_all[-1]
        return teacher

    def _from_logits(
        self,
        batch: Batch,
        outputs: Mapping[str, Any],
        task_loss: Tensor,
        teacher: Mapping[str, Any] | None,
        share: Tensor | float,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        if teacher is None:
            return task_loss, {}
        if not self._task(batch).compares(outputs):
            return task_loss, {"task": task_loss.detach()}
        kl = share * self._task(batch).divergence(outputs, teacher, batch.inputs, self.temperature)
        loss = (1 - self.alpha) * task_loss + self.alpha * kl
        return loss, {"task": task_loss.detach(), "kl": kl.detach()}

    def _from_head_input(
        self, batch: Batch, outputs: Mapping[str, Any], teacher: Mapping[str, Any] | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Computes what `_from_logits` does, without logits. The operator weighs task and divergence itself: it makes
        the gradient of their sum in the same pass."""
        head = batch.head
        assert head is not None
        targets = self._task(batch).targets(batch.inputs["labels"])
        sums = head_loss(
            outputs[HEAD_INPUT],
            head.own_weight,
            head.own_bias,
            targets,
            teacher=None if teacher is None else teacher[HEAD_INPUT],
            alpha=self.alpha,
            temperature=self.temperature,
            smoothing=batch.smoothing,
        )
        items = batch.accumulation.items(targets)
        loss, task_loss, kl = (value / items for value in sums)
        if teacher is None:
            return loss, {}
        return loss, {"task": task_loss, "kl": kl}

    def _task(self, batch: Batch) -> Task:
        return self.task if batch.task is None else batch.task

    def _share(self, batch: Batch) -> Tensor | float:
        return batch.accumulation.share(self._task(batch).targets_in(batch.inputs))


def _zero_if_unlabelled(
    unlabelled: Tensor, loss: Tensor, parts: dict[str, Tensor], task_loss: Tensor | None
) -> tuple[Tensor, dict[str, Tensor]]:
    """Makes loss and parts zero where no label counts; a loss of somebody's own, if it is NaN then."""
    if task_loss is not None:
        unlabelled = unlabelled & task_loss.detach().isnan()
    kept = {name: part.masked_fill(unlabelled, 0) for name, part in parts.items()}
    return loss.masked_fill(unlabelled, 0), kept
