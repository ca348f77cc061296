"""Several sliced linear layers over one W: each group of tokens runs at a size of its own.

    x_j            = x[T_j, :n_j]
    y[T_j, rows_j] = x_j · W[rows_j, :n_j]ᵀ + b[rows_j] + Σ_s c_s · (x_j · A_s[:, :n_j]ᵀ) · B_s[rows_j]ᵀ

Shapes: x (T, N) and y (T, M) at the full width of W (M, N); T_j are consecutive tokens, rows_j spans of W's rows. Off
its spans, and for tokens in no group, y is zero; off its columns and spans, what x and dy hold is not read. The rest is
as in `mlfs.ops.sliced_linear`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mlfs.errors import MLFSError
from mlfs.ops.autograd import (
    differentiable,
    gradients_of_layers,
    keep_layers,
    kept_layers,
    like_trained,
    no_gradient,
    wanted_if,
)
from mlfs.ops.backend import in_autocast_type, run, runs_as_operators
from mlfs.ops.backends.table import implements
from mlfs.ops.layer import NOTHING, FlatLayers, LowRankLinear, Wanted, flatten, unflatten
from mlfs.ops.sliced_linear import linear_backward_reference, linear_forward_reference, sliced_linear_reference

__all__ = ["Group", "grouped_sliced_linear", "grouped_sliced_linear_reference"]
MAX_SPANS = 3  # of a group: query, key and value of a fused projection
_FIELDS = 3 + 2 * MAX_SPANS


@dataclass(frozen=True)
class Group:
    """`tokens` consecutive rows of x from `first` on that read `n` columns and write `spans` (start, length, ...)."""

    first: int
    tokens: int
    n: int
    spans: tuple[int, ...]

    @property
    def rows(self) -> slice:
        """Its tokens."""
        return slice(self.first, self.first + self.tokens)

    def read_by(self, layer: LowRankLinear) -> LowRankLinear:
        """The layer at the group's size: with those of the group's spans that are not empty."""
        pairs = zip(self.spans[::2], self.spans[1::2], strict=True)
        return layer._replace(spans=[number for pair in pairs if pair[1] for number in pair])


def grouped_sliced_linear_reference(x: Tensor, layer: LowRankLinear, groups: Sequence[Group]) -> Tensor:
    """Computes the formula in plain, differentiable PyTorch: one sliced product after the other."""
    y = x.new_zeros(x.shape[0], layer.weight.shape[0])  # (T, M)
    for group in groups:
        own = group.read_by(layer)
        if own.rows:
            part = sliced_linear_reference(x[group.rows, : group.n], own)
            for rows, place in own.places:
                y[group.rows, rows] = part[:, place]
    return y


def grouped_sliced_linear(x: Tensor, layer: LowRankLinear, groups: Sequence[Group]) -> Tensor:
    """Computes the formula above, with W and b frozen.

    Args:
        x: (T, N), floating point; under autocast cast to its type.
        layer: as in `sliced_linear`; its own spans are not read.
        groups: sizes and spans of consecutive tokens; at most three spans each.

    Returns:
        (T, M) of x's type.

    Raises:
        MLFSError: groups that overlap, or lie outside x or W.
    """
    # Checked here, once for all backends: kernels write where the groups say.
    _check_groups(groups, x.shape[0], layer)
    x = in_autocast_type(x)
    if not runs_as_operators():
        return grouped_sliced_linear_reference(x, layer, groups)
    numbers = [number for group in groups for number in _pack(group)]
    return _grouped_linear(x, *flatten([layer]), numbers)[0]


def _check_groups(groups: Sequence[Group], tokens: int, layer: LowRankLinear) -> None:
    rows, columns = layer.weight.shape
    end = 0  # of the tokens of the groups before
    for group in groups:
        in_order = end <= group.first and group.first + group.tokens <= tokens and group.tokens >= 0
        pairs = list(zip(group.spans[::2], group.spans[1::2], strict=True))
        spans_fit = all(start >= 0 and length >= 0 and start + length <= rows for start, length in pairs)
        if not (in_order and 0 <= group.n <= columns and len(pairs) <= MAX_SPANS and spans_fit):
            raise MLFSError(
                f"{group}: expected tokens after {end} and within {tokens}, n of at most {columns}, and up to "
                f"{MAX_SPANS} spans of {rows} rows"
            )
        end = group.first + group.tokens


def _pack(group: Group) -> list[int]:
    """The group as the same number of numbers for each, which torch.library takes."""
    padding = [0] * (2 * MAX_SPANS - len(group.spans))
    return [group.first, group.tokens, group.n, *group.spans, *padding]


def unpack(numbers: list[int]) -> tuple[Group, ...]:
    """The groups that have tokens and spans; what a group without spans holds may be anything."""
    groups = []
    for place in range(0, len(numbers), _FIELDS):
        first, tokens, columns, *spans = numbers[place : place + _FIELDS]
        if tokens and any(spans[1::2]):
            groups.append(Group(first, tokens, columns, tuple(spans)))
    return tuple(groups)


# ---- what backends implement -----------------------------------------------------------------------------------------


@implements("reference", "grouped_forward")
def _grouped_forward(x: Tensor, layer: LowRankLinear, groups: tuple[Group, ...]) -> tuple[Tensor, Tensor]:
    """Computes (y (T, M), h (T, Σ r_s)): h are the stages' c_s · x A_sᵀ side by side, kept for the backward pass."""
    tokens = x.shape[0]
    # Zeros, which stay for tokens in no group, and off a group's spans.
    y, h = x.new_zeros(tokens, layer.weight.shape[0]), x.new_zeros(tokens, sum(layer.ranks))
    for group in groups:
        own = group.read_by(layer)
        # (tokens of the group, its rows side by side)
        part, h[group.rows], _ = linear_forward_reference(x[group.rows, : group.n], own, NOTHING, True)
        for rows, place in own.places:
            y[group.rows, rows] = part[:, place]
    return y, h


@implements("reference", "grouped_backward")
def _grouped_backward(
    dy: Tensor, x: Tensor | None, h: Tensor | None, layer: LowRankLinear, groups: tuple[Group, ...], wanted: Wanted
) -> tuple[Tensor, list[Tensor]]:
    """Computes (dx (T, N), or (0, N) where it is not wanted; [dA_s, dB_s, ...] of the stages that train)."""
    tokens = dy.shape[0] if wanted.dx else 0
    dx = dy.new_zeros((tokens, wanted.columns))
    total = [torch.zeros_like(t) for t in like_trained(layer.lora_a, layer.lora_b, wanted.trains)]
    for group in groups:
        own = group.read_by(layer)
        # (tokens of the group, its rows side by side)
        dy_of_group = torch.cat([dy[group.rows, rows] for rows, _ in own.places], 1)
        x_of_group, h_of_group = x, h
        if x is not None and h is not None:
            x_of_group, h_of_group = x[group.rows, : group.n], h[group.rows]
        wanted_here = Wanted(wanted.trains, wanted.dx, group.n)
        part, gradients = linear_backward_reference(dy_of_group, x_of_group, h_of_group, own, wanted_here)
        if wanted.dx:
            dx[group.rows, : group.n] = part
        # The layer is one, so its adapters' gradients are sums over the groups.
        for gradient, summand in zip(total, gradients, strict=True):
            gradient += summand
    return dx, total


# ---- the operator ----------------------------------------------------------------------------------------------------


@torch.library.custom_op("mlfs::grouped_sliced_linear", mutates_args=())
def _grouped_linear(
    x: Tensor,
    weights: list[Tensor],
    biases: list[Tensor],
    lora_a: list[Tensor],
    lora_b: list[Tensor],
    scales: list[float],
    spans: list[int],
    groups: list[int],
) -> tuple[Tensor, Tensor]:
    """(y, h): see `_grouped_forward`."""
    (layer,) = unflatten(weights, biases, lora_a, lora_b, scales, spans)
    return run("grouped_forward", (x,), x, layer, unpack(groups))


@_grouped_linear.register_fake
def _(x, weights, biases, lora_a, lora_b, scales, spans, groups):
    ranks = sum(stage.shape[0] for stage in lora_a)
    return x.new_empty(x.shape[0], weights[0].shape[0]), x.new_empty(x.shape[0], ranks)


@torch.library.custom_op("mlfs::grouped_sliced_linear_backward", mutates_args=())
def _grouped_linear_backward(
    dy: Tensor,
    x: Tensor | None,
    h: Tensor | None,
    weights: list[Tensor],
    lora_a: list[Tensor],
    lora_b: list[Tensor],
    scales: list[float],
    spans: list[int],
    groups: list[int],
    trains: list[bool],
    needs_dx: bool,
) -> list[Tensor]:
    """[dx (empty unless needed), dA_s and dB_s of each stage s that trains]."""
    (layer,) = unflatten(weights, [], lora_a, lora_b, scales, spans)
    wanted = Wanted(trains, needs_dx, layer.weight.shape[1])
    dx, gradients = run("grouped_backward", (dy,), dy, x, h, layer, unpack(groups), wanted)
    return [dx, *gradients]


@_grouped_linear_backward.register_fake
def _(dy, x, h, weights, lora_a, lora_b, scales, spans, groups, trains, needs_dx):
    tokens = dy.shape[0] if needs_dx else 0
    return [dy.new_empty(tokens, weights[0].shape[1]), *like_trained(lora_a, lora_b, trains)]


def _keep(ctx: Any, inputs: Sequence[Any], output: Sequence[Tensor]) -> None:
    x, *layer, groups = inputs
    ctx.groups = groups
    keep_layers(ctx, x, FlatLayers(*layer), for_adapters=(x, output[1]))


def _gradients(ctx: Any, of_outputs: Sequence[Tensor | None], of_input: None) -> tuple[Any, ...]:
    dy, of_groups = of_outputs[0], no_gradient(ctx.groups)
    if dy is None:
        return None, *gradients_of_layers(ctx, None), of_groups
    needs_dx = ctx.needs_input_grad[0]
    (x, h), layers = kept_layers(ctx)
    dx, *of_stages = _grouped_linear_backward(dy, x, h, *layers, ctx.groups, ctx.trains, needs_dx)
    return wanted_if(needs_dx, dx), *gradients_of_layers(ctx, of_stages), of_groups


differentiable(_grouped_linear, _keep, _gradients, results=lambda inputs: 1)
