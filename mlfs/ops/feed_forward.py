"""The feed-forward block of a transformer's layer in training, as one operator:

    y = down(act(up(x))) + residual              act: GELU, by erf or tanh
    y = down(SiLU(gate(x)) · up(x)) + residual   gated pairs (arXiv 2002.05202), act "silu_mul"

Each is a linear layer as in `mlfs.ops.sliced_linear`. Shapes: x (..., n), y and residual (..., m). Forward it calls
`joint_linear` and `sliced_linear`. Backward, the product that makes the gradient of what `down` reads takes it through
the activation while it is in registers; apart, it is written, and read again by a pass of its own.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from mlfs.errors import MLFSError
from mlfs.ops.backend import backend_of, in_autocast_type
from mlfs.ops.joint_linear import (
    Projection,
    _joint_linear,
    _joint_linear_backward,
    _layers,
    joint_linear_reference,
    may_join,
)
from mlfs.ops.layer import Activated, LowRankLinear, Wanted
from mlfs.ops.sliced_linear import (
    ACTIVATIONS,
    _sliced_linear,
    _sliced_linear_backward,
    of_each_stage,
    sliced_linear_reference,
)

__all__ = ["feed_forward", "feed_forward_reference", "may_feed_forward"]


def feed_forward_reference(
    x: Tensor, layers: Sequence[Projection], activation: str, residual: Tensor | None = None
) -> Tensor:
    """The formula in plain, differentiable PyTorch."""
    *ups, down = layers
    if activation == "silu_mul":
        (x,) = joint_linear_reference(x, ups, gated=True)
    else:
        x = sliced_linear_reference(x, *ups[0][:5], [0, ups[0].rows], activation)
    return sliced_linear_reference(x, *down[:5], [0, down.rows], residual=residual)


def may_feed_forward(layers: Sequence[Projection], activation: str) -> bool:
    """Whether `feed_forward` is for [up, down], or [gate, up, down] of "silu_mul": with as many stages each, and all
    with a bias or none; gate and up of one size, of stages of one rank."""
    ups, gated = layers[:-1], activation == "silu_mul"
    if len({(len(p.lora_a), p.bias is None) for p in layers}) > 1 or activation not in ACTIVATIONS[1:]:
        return False
    return len(ups) == 1 + gated and (not gated or (may_join(ups) and ups[0].rows == ups[1].rows))


def feed_forward(
    x: Tensor,
    layers: Sequence[Projection],
    activation: str,
    residual: Tensor | None = None,
    returns_input: bool = False,
) -> list[Tensor]:
    """The formula above, with weights and biases frozen: [y], or, if it `returns_input`, [y, x].

    Args:
        x: (..., n), floating point; under autocast cast to its type.
        layers: those that `may_feed_forward`.
        residual: (..., m), added last; the result has the wider of its type and x's. It may be x itself.
        returns_input: also return x, for what else reads it: the gradient that comes back through it is added by the
            product that makes dx.

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
    adds_x = residual is given and x is given
    lora_a, lora_b = [a for layer in layers for a in layer.lora_a], [b for layer in layers for b in layer.lora_b]
    biases = [layer.bias for layer in layers if layer.bias is not None]
    scales, rows = [c for layer in layers for c in layer.scales], [layer.rows for layer in layers]
    options = rows, activation, None if adds_x else residual, adds_x
    if returns_input and x is given:
        lists = [layer.weight for layer in layers], biases, scales
        return list(_Carrying.apply(x, *lists, *options, len(lora_a), *lora_a, *lora_b))
    y = _feed_forward(x, [layer.weight for layer in layers], biases, lora_a, lora_b, scales, *options)[0]
    return [y, given] if returns_input else [y]


@torch.library.custom_op("mlfs::feed_forward", mutates_args=())
def _feed_forward(
    x: Tensor,
    weights: list[Tensor],
    biases: list[Tensor],
    lora_a: list[Tensor],
    lora_b: list[Tensor],
    scales: list[float],
    rows: list[int],
    activation: str,
    residual: Tensor | None,
    adds_x: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(y, h of what reads x, h of down, what goes into the activation, up(x) if gated, what down reads, unless it is
    made again): all but y are 2-d, and for the backward pass."""
    flat, m = x.reshape(-1, x.shape[-1]), rows[-1]
    last = len(lora_a) // len(weights) * (len(weights) - 1)  # of the stages of what reads x
    first = lora_a[:last], lora_b[:last], scales[:last]
    if activation == "silu_mul":
        act, up, _, h, z = _joint_linear(flat, weights[:2], biases[:2], *first, rows[:2], True, True)
    else:
        bias = biases[0] if biases else None
        act, h, z = _sliced_linear(flat, weights[0], bias, *first, [0, rows[0]], activation, None, None, True)
        up = x.new_empty(0)
    down = weights[-1], biases[-1] if biases else None, lora_a[last:], lora_b[last:], scales[last:], [0, m]
    added = flat if adds_x else None if residual is None else residual.reshape(-1, m)
    y, h_down, _ = _sliced_linear(act, *down, "none", None, added, True)
    return y.view(*x.shape[:-1], m), h, h_down, z, up, x.new_empty(0) if _makes_again(x) else act


def _makes_again(x: Tensor) -> bool:
    """Whether the backward pass makes what `down` reads again: wider numbers spill."""
    return backend_of(x) == "triton" and x.dtype.itemsize == 2


@_feed_forward.register_fake
def _(x, weights, biases, lora_a, lora_b, scales, rows, activation, residual, adds_x):
    tokens, last = x.shape[:-1].numel(), len(lora_a) // len(weights) * (len(weights) - 1)
    kind = x.dtype if residual is None else torch.result_type(x, residual)
    h, h_down = (x.new_empty((tokens, sum(a.shape[0] for a in some))) for some in (lora_a[:last], lora_a[last:]))
    z, up, act = (x.new_empty((tokens, rows[0])) for _ in range(3))
    act = x.new_empty(0) if _makes_again(x) else act
    y = x.new_empty((*x.shape[:-1], rows[-1]), dtype=kind)
    return y, h, h_down, z, up if activation == "silu_mul" else x.new_empty(0), act


@torch.library.custom_op("mlfs::feed_forward_backward", mutates_args=())
def _feed_forward_backward(
    dy: Tensor,
    x: Tensor | None,
    h: Tensor | None,
    h_down: Tensor | None,
    act: Tensor | None,
    z: Tensor,
    up: Tensor | None,
    weights: list[Tensor],
    lora_a: list[Tensor],
    lora_b: list[Tensor],
    scales: list[float],
    trains: list[bool],
    activation: str,
    residual: Tensor | None,
    needs_dx: bool,
    columns: int,
) -> list[Tensor]:
    """[dx (empty unless needed), dA and dB of each stage that trains]; `residual`, of x's shape, is added to dx."""
    grad, flat = dy.reshape(-1, dy.shape[-1]), None if x is None else x.reshape(-1, columns)
    added = None if residual is None or not needs_dx else residual.reshape(-1, columns)
    last, width = len(lora_a) // len(weights) * (len(weights) - 1), z.shape[1]
    goes_on = needs_dx or any(trains[:last])
    down = h_down, weights[-1], lora_a[last:], lora_b[last:], scales[last:], [0, grad.shape[1]], trains[last:]
    pair = weights[:-1], lora_a[:last], lora_b[:last], scales[:last], trains[:last], needs_dx, columns
    single = weights[0], *pair[1:4], [0, width], *pair[4:]  # as the operator of one layer takes it
    before: list[Tensor] = []
    if backend_of(dy, *weights, *lora_a, *lora_b, z, up) == "triton":
        from mlfs.kernels import joint, product

        act = None if act is None or _makes_again(dy) else act
        layer = LowRankLinear(weights[-1], None, *down[2:6])
        wanted, activated = Wanted(trains[last:], goes_on, width), Activated(activation, z, up)
        dz, d_up, own = product.backward_through_activation(grad, act, h_down, layer, wanted, activated)
        wanted = Wanted(trains[:last], needs_dx, columns)
        if goes_on and up is None:
            layer = LowRankLinear(weights[0], None, *single[1:5])
            dx, before = product.backward(dz, flat, h, layer, wanted, added)
        elif goes_on and d_up is not None:
            layers = _layers(weights[:-1], [], *pair[1:4], [width, width])
            dx, before = joint.backward([dz, d_up], flat, h, layers, wanted, added)
    else:
        d_act, _, *own = _sliced_linear_backward(grad, act, *down, goes_on, width, "none", None, None)
        if goes_on and up is None:
            dx, _, *before = _sliced_linear_backward(d_act, flat, h, *single, activation, z, None)
            dx = dx if added is None else dx + added
        elif goes_on:
            dx, *before = _joint_linear_backward([d_act], flat, h, *pair, z, up, added)
    dx = dx.view(*dy.shape[:-1], columns) if needs_dx else dy.new_empty((0, columns))
    return [dx, *before, *own]


@_feed_forward_backward.register_fake
def _(dy, x, h, h_down, act, z, up, weights, lora_a, lora_b, scales, trains, activation, residual, needs_dx, columns):
    dx = dy.new_empty((*dy.shape[:-1], columns) if needs_dx else (0, columns))
    stages = [(a, b) for a, b, train in zip(lora_a, lora_b, trains, strict=True) if train]
    return [dx, *(torch.empty_like(t) for pair in stages for t in pair)]


def _keep(ctx, inputs, output) -> None:
    x, weights, biases, lora_a, lora_b, ctx.scales, _, ctx.activation, _, ctx.adds_x = inputs
    _, h, h_down, z, up, act = output
    ctx.set_materialize_grads(False)
    ctx.trains = [a.requires_grad or b.requires_grad for a, b in zip(lora_a, lora_b, strict=True)]
    ctx.layers, ctx.biases, ctx.stages = len(weights), len(biases), len(lora_a)
    ctx.columns, ctx.kind = x.shape[-1], x.dtype
    kept = [x, h, h_down, act] if any(ctx.trains) else []
    ctx.save_for_backward(*kept, z, *([up] if ctx.activation == "silu_mul" else []), *weights, *lora_a, *lora_b)


def _gradients(
    ctx, dy: Tensor | None, more: Tensor | None
) -> tuple[Tensor | None, list[Tensor | None], list[Tensor | None]]:
    """(dx, dA of each stage, dB of each) from the gradients of y and of the x that is carried on."""
    if dy is None:
        nothing: list[Tensor | None] = [None] * ctx.stages
        return more, nothing, nothing
    saved = list(ctx.saved_tensors)
    x, h, h_down, act = [saved.pop(0) for _ in range(4)] if any(ctx.trains) else [None] * 4
    z, up = saved.pop(0), saved.pop(0) if ctx.activation == "silu_mul" else None
    weights, lora = saved[: ctx.layers], saved[ctx.layers :]
    dy = dy.to(ctx.kind)
    if ctx.adds_x:
        more = dy if more is None else more + dy
    needs_dx = ctx.needs_input_grad[0]
    out = _feed_forward_backward(
        dy, x, h, h_down, act, z, up, weights, lora[: ctx.stages], lora[ctx.stages :], ctx.scales, ctx.trains,
        ctx.activation, more if needs_dx else None, needs_dx, ctx.columns,
    )  # fmt: skip
    return out[0] if needs_dx else None, *of_each_stage(ctx.trains, out[1:])


def _setup_context(ctx, inputs, output) -> None:
    ctx.mark_non_differentiable(*output[1:])
    _keep(ctx, inputs, output)


def _backward(ctx, dy, *others):
    dx, da, db = _gradients(ctx, dy, None)
    numbers = None if ctx.scales else []  # an empty list of numbers looks like one of tensors to torch.library
    frozen = [None] * ctx.layers, [None] * ctx.biases
    return dx, *frozen, da, db, numbers, None, None, dy if ctx.needs_input_grad[8] else None, None


_feed_forward.register_autograd(_backward, setup_context=_setup_context)


class _Carrying(torch.autograd.Function):
    """The operator, and x: an operator cannot hand x on, as its outputs share no memory with its inputs."""

    @staticmethod
    def forward(ctx, x, weights, biases, scales, rows, activation, residual, adds_x, stages, *lora):
        inputs = (
            x,
            weights,
            biases,
            list(lora[:stages]),
            list(lora[stages:]),
            scales,
            rows,
            activation,
            residual,
            adds_x,
        )
        output = _feed_forward(*inputs)
        _keep(ctx, inputs, output)
        return output[0], x.view_as(x)

    @staticmethod
    def backward(ctx, dy, more):
        dx, da, db = _gradients(ctx, dy, more)
        return dx, *[None] * 5, dy if ctx.needs_input_grad[6] else None, None, None, *da, *db
