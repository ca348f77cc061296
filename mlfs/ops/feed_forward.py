"""The feed-forward block of a transformer's layer in training, as one operator:

    y = down(act(up(x))) + residual              act: GELU, by erf or tanh
    y = down(SiLU(gate(x)) · up(x)) + residual   gated pairs (arXiv 2002.05202), act "silu_mul"

Each is a linear layer as in `mlfs.ops.sliced_linear`. Shapes: x (..., n), y and residual (..., m). Forward it calls
what `joint_linear` and `sliced_linear` call. Backward, the product that makes the gradient of what `down` reads takes
it through the activation while it is in registers; apart, it is written, and read again by a pass of its own.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mlfs.errors import MLFSError
from mlfs.ops.autograd import (
    differentiable,
    flat_rows,
    gradients_of_layers,
    keep_layers,
    kept_layers,
    like_trained,
    tokens_of,
    wanted_if,
)
from mlfs.ops.backend import in_autocast_type, runs_as_operators
from mlfs.ops.joint_linear import joint_backward, joint_forward, joint_linear_reference, may_join, reads_leading_rows
from mlfs.ops.layer import (
    ACTIVATIONS,
    Activated,
    Epilogue,
    FlatLayers,
    LowRankLinear,
    Wanted,
    flatten,
    unflatten,
)
from mlfs.ops.sliced_linear import (
    linear_backward,
    linear_backward_through_activation,
    linear_forward,
    makes_activated_again,
    sliced_linear_reference,
)

__all__ = ["feed_forward", "feed_forward_reference", "may_feed_forward"]


def feed_forward_reference(
    x: Tensor, layers: Sequence[LowRankLinear], activation: str, residual: Tensor | None = None
) -> Tensor:
    """Computes the formula in plain, differentiable PyTorch."""
    *ups, down = layers
    if activation == "silu_mul":
        (activated,) = joint_linear_reference(x, ups, gated=True)
    else:
        activated = sliced_linear_reference(x, ups[0], Epilogue(activation))
    return sliced_linear_reference(activated, down, Epilogue(residual=residual))


def may_feed_forward(layers: Sequence[LowRankLinear], activation: str) -> bool:
    """Says whether `feed_forward` is for [up, down], or [gate, up, down] of "silu_mul".

    They read leading rows, have as many stages each, and all a bias or none; gate and up are of one size, and their
    stages of one rank.
    """
    *ups, down = layers
    # Layers are laid out as lists, which are cut into as many equal parts: see `mlfs.ops.layer.unflatten`.
    kinds = {(len(layer.lora_a), layer.bias is None) for layer in layers}
    if len(kinds) > 1 or activation not in ACTIVATIONS[1:] or not reads_leading_rows(down):
        return False
    if activation == "silu_mul":
        return len(ups) == 2 and may_join(ups) and ups[0].rows == ups[1].rows
    return len(ups) == 1 and reads_leading_rows(ups[0])


def feed_forward(
    x: Tensor,
    layers: Sequence[LowRankLinear],
    activation: str,
    residual: Tensor | None = None,
    returns_input: bool = False,
) -> list[Tensor]:
    """Computes the formula above, with weights and biases frozen.

    Args:
        x: (..., n), floating point; under autocast cast to its type.
        layers: those that `may_feed_forward`.
        residual: (..., m), added last; the result has the wider of its type and x's. It may be x itself.
        returns_input: also return x, for what else reads it: the gradient that comes back through it is added by the
            product that makes dx.

    Returns:
        [y], or, if it `returns_input`, [y, x].

    Raises:
        MLFSError: layers that cannot go together.
    """
    if not may_feed_forward(layers, activation):
        raise MLFSError(
            f"{len(layers)} layers of {', '.join(str(layer.rows) for layer in layers)} rows around {activation!r}: "
            "expected up and down, or gate, up and down for 'silu_mul', with the same number of stages, and all with "
            "a bias or none; gate and up of one size and rank"
        )
    given, x = x, in_autocast_type(x)
    if not runs_as_operators():
        y = feed_forward_reference(x, layers, activation, residual)
        return [y, given] if returns_input else [y]
    # x as a residual is no input of its own: its gradient is added where dx is made.
    adds_x = residual is given and x is given
    inputs = (x, None if adds_x else residual, *flatten(layers), activation, adds_x)
    if returns_input and x is given:
        return list(_feed_forward_returning_input(*inputs))
    y = _feed_forward(*inputs)[0]
    return [y, given] if returns_input else [y]


@torch.library.custom_op("mlfs::feed_forward", mutates_args=())
def _feed_forward(
    x: Tensor,
    residual: Tensor | None,
    weights: list[Tensor],
    biases: list[Tensor],
    lora_a: list[Tensor],
    lora_b: list[Tensor],
    scales: list[float],
    spans: list[int],
    activation: str,
    adds_x: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(y, h of what reads x, h of down, pre: what goes into the activation, up(x) if gated, what down reads unless it
    is made again): all but y are 2-d, and for the backward pass."""
    *ups, down = unflatten(weights, biases, lora_a, lora_b, scales, spans)
    flat = flat_rows(x)  # (T, n)
    operand = x.new_empty(0)
    if activation == "silu_mul":
        (activated, operand), h, pre = joint_forward(flat, ups, True, True)  # (T, width) all but h
    else:
        activated, h, pre = linear_forward(flat, ups[0], Epilogue(activation), True)
    added = flat if adds_x else flat_rows(residual)
    y, h_down, _ = linear_forward(activated, down, Epilogue(residual=added), True)
    if makes_activated_again(x):  # from pre and operand, beside dx: it is not kept
        activated = x.new_empty(0)
    return y.view(*x.shape[:-1], down.rows), h, h_down, pre, operand, activated


@_feed_forward.register_fake
def _(x, residual, weights, biases, lora_a, lora_b, scales, spans, activation, adds_x):
    tokens, rows = tokens_of(x), spans[1::2]
    dtype = x.dtype
    if residual is not None:
        dtype = torch.result_type(x, residual)
    y = x.new_empty((*x.shape[:-1], rows[-1]), dtype=dtype)
    ranks = [stage.shape[0] for stage in lora_a]
    reads_x = _stages_that_read_x(weights, lora_a)
    h, h_down = x.new_empty((tokens, sum(ranks[:reads_x]))), x.new_empty((tokens, sum(ranks[reads_x:])))
    pre, operand, activated = (x.new_empty((tokens, rows[0])) for _ in range(3))
    if activation != "silu_mul":
        operand = x.new_empty(0)
    if makes_activated_again(x):
        activated = x.new_empty(0)
    return y, h, h_down, pre, operand, activated


def _stages_that_read_x(weights: list[Tensor], lora_a: list[Tensor]) -> int:
    """The number of stages of all layers but `down`, which come first."""
    return len(lora_a) // len(weights) * (len(weights) - 1)


@torch.library.custom_op("mlfs::feed_forward_backward", mutates_args=())
def _feed_forward_backward(
    dy: Tensor,
    x: Tensor | None,
    h: Tensor | None,
    h_down: Tensor | None,
    activated: Tensor | None,
    pre: Tensor,
    operand: Tensor | None,
    residual: Tensor | None,
    weights: list[Tensor],
    lora_a: list[Tensor],
    lora_b: list[Tensor],
    scales: list[float],
    spans: list[int],
    trains: list[bool],
    needs_dx: bool,
    columns: int,
    activation: str,
) -> list[Tensor]:
    """[dx (empty unless needed), dA and dB of each stage that trains]; `residual`, of x's shape, is added to dx."""
    *ups, down = unflatten(weights, [], lora_a, lora_b, scales, spans)
    reads_x = _stages_that_read_x(weights, lora_a)
    goes_on = needs_dx or any(trains[:reads_x])  # beyond `down`
    if makes_activated_again(dy):
        activated = None
    d_pre, d_operand, of_down = linear_backward_through_activation(
        flat_rows(dy),
        activated,
        h_down,
        down,
        Wanted(trains[reads_x:], goes_on, pre.shape[1]),
        Activated(activation, pre, operand),
    )
    dx = dy.new_empty((0, columns))
    of_ups: list[Tensor] = []
    if goes_on:
        wanted = Wanted(trains[:reads_x], needs_dx, columns)
        added = flat_rows(residual) if needs_dx else None
        if d_operand is None:
            dx, of_ups = linear_backward(d_pre, flat_rows(x), h, ups[0], wanted, added)
        else:
            dx, of_ups = joint_backward([d_pre, d_operand], flat_rows(x), h, ups, wanted, added)
    if needs_dx:
        dx = dx.view(*dy.shape[:-1], columns)
    return [dx, *of_ups, *of_down]


@_feed_forward_backward.register_fake
def _(
    dy, x, h, h_down, activated, pre, operand, residual, weights, lora_a, lora_b, scales, spans, trains, needs_dx,
    columns, activation,
):  # fmt: skip
    dx = dy.new_empty((*dy.shape[:-1], columns) if needs_dx else (0, columns))
    return [dx, *like_trained(lora_a, lora_b, trains)]


def _keep(ctx: Any, inputs: Sequence[Any], output: Sequence[Tensor]) -> None:
    x, _, *layers, activation, adds_x = inputs
    _, h, h_down, pre, operand, activated = output
    ctx.activation, ctx.adds_x = activation, adds_x
    others = (pre, operand if activation == "silu_mul" else None)
    keep_layers(ctx, x, FlatLayers(*layers), for_adapters=(x, h, h_down, activated), others=others)


def _gradients(ctx: Any, of_outputs: Sequence[Tensor | None], of_input: Tensor | None) -> tuple[Any, ...]:
    dy = of_outputs[0]
    if dy is None:  # nothing comes back through the layers
        return of_input, None, *gradients_of_layers(ctx, None), None, None
    needs_dx, needs_residual = ctx.needs_input_grad[:2]
    through = dy.to(ctx.dtype)
    # What else comes back to x is added by the product that makes dx: of its other readers, and of x as the residual.
    added = of_input
    if ctx.adds_x:
        added = through if of_input is None else of_input + through
    (x, h, h_down, activated, pre, operand), layers = kept_layers(ctx)
    dx, *of_stages = _feed_forward_backward(
        through, x, h, h_down, activated, pre, operand, added if needs_dx else None, *layers, ctx.trains,
        needs_dx, ctx.columns, ctx.activation,
    )  # fmt: skip
    return wanted_if(needs_dx, dx), wanted_if(needs_residual, dy), *gradients_of_layers(ctx, of_stages), None, None


_feed_forward_returning_input = differentiable(_feed_forward, _keep, _gradients, results=lambda inputs: 1)
