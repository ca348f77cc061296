"""The loss of a subnet: its task loss and what it learns from maxnet (`mlfs.ops.distill` has the formulas)."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mlfs.errors import MLFSError
from mlfs.ops.distill import divergence, feature_distance
from mlfs.space.subnet import Subnet


class Distiller(nn.Module):
    """L_j = (1 − α) task_j + α KL(maxnet ‖ j) + Σ_l β_{g(l)} feature_{j,l}, with one projection per maxnet layer.

    Args:
        hidden, layers: of maxnet. size: numbers a projection keeps. betas: one weight, or one per layer.
        learned: whether the projections train; else they are random and orthonormal, drawn from `seed`.
        final_norm: whether the last hidden state the model reports is a normalised one. It then has a like only in
            maxnet's last, and a subnet that ends at an earlier layer does not compare it.
    """

    def __init__(
        self,
        hidden: int,
        layers: int,
        alpha: float,
        betas: Sequence[float],
        temperature: float = 1.0,
        size: int = 64,
        learned: bool = False,
        seed: int = 0,
        final_norm: bool = False,
    ) -> None:
        super().__init__()
        if len(betas) not in (1, layers):
            raise MLFSError(f"distill_beta has {len(betas)} values: expected one, or one for each of {layers} layers")
        self.alpha, self.temperature, self.final_norm = alpha, temperature, final_norm
        self.betas = tuple(betas) * (layers if len(betas) == 1 else 1)
        self.layers = layers
        generator = torch.Generator().manual_seed(seed)
        size = min(size, hidden)
        draws = [torch.linalg.qr(torch.randn(hidden, size, generator=generator))[0].t() for _ in range(layers)]
        self.projections = nn.ParameterList(nn.Parameter(p.contiguous(), requires_grad=learned) for p in draws)

    @property
    def uses_features(self) -> bool:
        """Whether hidden states are needed."""
        return any(self.betas)

    def forward(
        self,
        subnet: Subnet,
        task_loss: Tensor,
        student: Mapping[str, Any],
        teacher: Mapping[str, Any],
        inputs: Mapping[str, Any],
        share: float | Tensor = 1.0,
        causal: bool = False,
        regression: bool = False,
        multi_label: bool = False,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of `subnet`, and its parts, detached.

        Args:
            task_loss: scalar. student, teacher: model outputs with logits (and hidden_states).
            inputs: of the batch; tokens whose label is ignored, or that are padding, are ignored here too.
            share: what part of an accumulated batch this batch is, where task_loss is already scaled so.
        """
        labels, attention = inputs.get("labels"), inputs.get("attention_mask")
        kl = share * output_divergence(
            student, teacher, labels, attention, self.temperature, causal, regression, multi_label
        )
        loss = (1 - self.alpha) * task_loss + self.alpha * kl
        parts = {"task": task_loss.detach(), "kl": kl.detach()}
        return self.add_features(loss, parts, subnet, student, teacher, attention, share)

    def add_features(
        self,
        loss: Tensor,
        parts: dict[str, Tensor],
        subnet: Subnet,
        student: Mapping[str, Any],
        teacher: Mapping[str, Any],
        attention: Tensor | None,
        share: float | Tensor = 1.0,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """(loss, parts) with the distances of the hidden states."""
        if not self.uses_features:
            return loss, parts
        feature = loss.new_zeros(())
        for i, layer in enumerate(subnet.layers):
            last = i == len(subnet.layers) - 1
            if not self.betas[layer] or (self.final_norm and last and layer != self.layers - 1):
                continue
            mine, goal = student["hidden_states"][i + 1], teacher["hidden_states"][layer + 1]
            if mine.shape[:-1] != goal.shape[:-1]:  # the last state of a model that ran without padding has it again
                mine, goal = (_without_padding(states, attention) for states in (mine, goal))
            mask = attention if attention is not None and attention.shape == mine.shape[:-1] else None
            feature = feature + self.betas[layer] * feature_distance(mine, goal, self.projections[layer], mask)
        feature = share * feature
        return loss + feature, {**parts, "feature": feature.detach()}


def _without_padding(states: Tensor, attention: Tensor | None) -> Tensor:
    """(1, tokens, n) of states (batch, length, n); of states that are so already, themselves."""
    if attention is not None and states.shape[:-1] == attention.shape:
        return states[attention.bool()].unsqueeze(0)
    return states.flatten(0, 1).unsqueeze(0)


def output_divergence(
    student: Mapping[str, Any],
    teacher: Mapping[str, Any],
    labels: Tensor | None,
    attention: Tensor | None,
    temperature: float = 1.0,
    causal: bool = False,
    regression: bool = False,
    multi_label: bool = False,
) -> Tensor:
    """How far a subnet's outputs are from maxnet's, by kind of output: KL divergence over classes or tokens, of start
    and end for question answering, of each label for multi-label tasks; the mean squared difference for regression."""
    if "start_logits" in student:
        ends = ("start_logits", "end_logits")
        return sum((divergence(student[e], teacher[e], None, temperature) for e in ends), torch.tensor(0.0)) / 2
    mine, goal = student["logits"], teacher["logits"].detach()
    if regression:
        return (mine.float() - goal.float()).pow(2).mean()
    if multi_label:  # a sigmoid is a softmax over the logit and zero
        return divergence(_with_zero(mine), _with_zero(goal), None, temperature)
    mask = token_mask(mine, labels, attention, causal)
    if causal:
        mine, goal = mine[:, :-1], goal[:, :-1]
    return divergence(mine, goal, mask, temperature)


def token_mask(logits: Tensor, labels: Tensor | None, attention: Tensor | None, causal: bool) -> Tensor | None:
    """Which rows of the logits count: those whose label (the next token's, if causal) is not ignored; without labels,
    those that are not padding; None for all."""
    source = labels.ne(-100) if labels is not None and labels.shape == logits.shape[:-1] else None
    if source is None and attention is not None and attention.shape == logits.shape[:-1]:
        source = attention.bool()
    if source is None:
        return None
    return source[:, 1:] if causal else source


def _with_zero(logits: Tensor) -> Tensor:
    return torch.stack([logits, torch.zeros_like(logits)], dim=-1)


def detached(outputs: Mapping[str, Any]) -> dict[str, Any]:
    """Model outputs without their graph, and without the key-value cache."""

    def detach(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.detach()
        return tuple(detach(v) for v in value) if isinstance(value, tuple) else value

    return {key: detach(value) for key, value in outputs.items() if key != "past_key_values"}
