"""Linear layers that read the same x (query, key and value; gate and up) in one call:

    y_i = x · W_i[:m_i, :n]ᵀ + b_i[:m_i] + Σ_s c_is · (x · A_is[:, :n]ᵀ) · B_is[:m_i]ᵀ
    gated, of two layers: y = SiLU(y_0) · y_1

Shapes and types are those of `mlfs.ops.sliced_linear`, whose calls these are; kernels make every y in one launch, after
one for all adapters. Backward, dx = Σ_i dz_i · W_i + Σ_is g_is · A_is (g_is = c_is · dz_i · B_is) is summed in the
accumulator of one product; separate calls write every summand and add them up in passes of their own.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mlfs.errors import MLFSError
from mlfs.ops.backend import backend_of, cpp, in_autocast_type
from mlfs.ops.layer import LowRankLinear, Wanted
from mlfs.ops.sliced_linear import (
    ACTIVATIONS,
    _sliced_linear,
    _sliced_linear_backward,
    of_each_stage,
    sliced_linear_reference,
)

__all__ = ["Projection", "joint_linear", "joint_linear_reference", "may_join"]


class Projection(NamedTuple):
    """One of the layers: W (M, N), b (M,) or None; of each stage A (r, N), B (M, r) and c; how many rows it has now."""

    weight: Tensor
    bias: Tensor | None
    lora_a: list[Tensor]
    lora_b: list[Tensor]
    scales: list[float]
    rows: int


def joint_linear_reference(x: Tensor, layers: Sequence[Projection], gated: bool = False) -> list[Tensor]:
    """The formula in plain, differentiable PyTorch."""
    ys = [sliced_linear_reference(x, *layer[:5], [0, layer.rows]) for layer in layers]
    return [torch.nn.functional.silu(ys[0]) * ys[1]] if gated else ys


def may_join(layers: Sequence[Projection]) -> bool:
    """Whether `joint_linear` is for them: two or three, alike in their stages, in having biases and in their types."""
    kinds = {
        (
            tuple(a.shape for a in p.lora_a), tuple(b.shape[1] for b in p.lora_b),
            tuple(None if t is None else t.dtype for t in (p.weight, p.bias, *p.lora_b)),
        )
        for p in layers
    }  # fmt: skip
    return 2 <= len(layers) <= 3 and len(kinds) == 1 and len({a.shape for p in layers for a in p.lora_a}) <= 1


def joint_linear(
    x: Tensor, layers: Sequence[Projection], gated: bool = False, returns_input: bool = False
) -> list[Tensor]:
    """The formula above, with W and b frozen: [y_0, y_1, ...], or, gated, [y]; and x, if it `returns_input`.

    Args:
        x: (..., n), floating point; under autocast cast to its type.
        layers: two or three that `may_join`; if gated, two of as many rows.
        returns_input: also return x, for what else reads it: the gradient that comes back through it is added by the
            product that makes dx. Not with gated layers.

    Raises:
        MLFSError: layers that cannot go together.
    """
    alike = len(layers) == 2 and layers[0].rows == layers[1].rows and not returns_input
    if not may_join(layers) or (gated and not alike):
        raise MLFSError(
            f"{len(layers)} layers of {', '.join(str(layer.rows) for layer in layers)} rows: expected two or three "
            "with the same number of stages, of one rank and type, and all with a bias or none; gated, two of one "
            "size, and x is not carried on"
        )
    given, x = x, in_autocast_type(x)
    lora_a, lora_b = [a for layer in layers for a in layer.lora_a], [b for layer in layers for b in layer.lora_b]
    keep = torch.is_grad_enabled() and any(t.requires_grad for t in (x, *lora_a, *lora_b))
    biases = [layer.bias for layer in layers if layer.bias is not None]
    scales, rows = [c for layer in layers for c in layer.scales], [layer.rows for layer in layers]
    weights = [p.weight for p in layers]
    if returns_input and keep and x is given:
        return list(_Carrying.apply(x, weights, biases, scales, rows, len(lora_a), *lora_a, *lora_b))
    out = _joint_linear(x, weights, biases, lora_a, lora_b, scales, rows, gated, keep)
    return [out[0]] if gated else [*out[: len(layers)], *([given] if returns_input else [])]


@torch.library.custom_op("mlfs::joint_linear", mutates_args=())
def _joint_linear(
    x: Tensor,
    weights: list[Tensor],
    biases: list[Tensor],
    lora_a: list[Tensor],
    lora_b: list[Tensor],
    scales: list[float],
    rows: list[int],
    gated: bool,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(y_0, y_1, y_2, h, z): y_2 is empty for two layers; h (T, R) are the c · x Aᵀ of all stages of all layers side by
    side. Gated, y_0 = SiLU(z) · y_1. h and z, and gated y_1, are for the backward pass; without `keep` they are empty.
    """
    flat = x.reshape(-1, x.shape[-1])
    if backend_of(x) == "triton" and _takes_kernels(flat.shape[0], keep):
        from mlfs.kernels import joint as kernels

        layers = _layers(weights, biases, lora_a, lora_b, scales, rows)
        ys, h, z = kernels.forward(flat, layers, gated, keep)
    else:
        hs: list[Tensor] = []
        ys, z = [], flat.new_empty(0)
        for i, stages in reversed(list(enumerate(_stages_of_each(len(weights), lora_a, lora_b, scales)))):
            gate = ("silu_mul", ys[0]) if gated and i == 0 else ("none", None)
            layer = (weights[i], biases[i] if biases else None, *stages, [0, rows[i]], *gate, None, keep)
            y, h, z = _sliced_linear(flat, *layer)
            ys, hs = [y, *ys], [h, *hs]
        h = torch.cat(hs, 1) if keep else z.new_empty(0)
    shown = [y.view(*x.shape[:-1], y.shape[1]) for y in ys]
    if gated and not keep:
        shown[1] = x.new_empty(0)
    third = shown[2] if len(shown) > 2 else x.new_empty(0)
    return shown[0], shown[1], third, h if keep else x.new_empty(0), z


@_joint_linear.register_fake
def _(x, weights, biases, lora_a, lora_b, scales, rows, gated, keep):
    tokens = x.shape[:-1].numel()
    ys = [x.new_empty((*x.shape[:-1], m)) for m in rows]
    if gated and not keep:
        ys[1] = x.new_empty(0)
    h = x.new_empty((tokens, sum(a.shape[0] for a in lora_a)) if keep else 0)
    return *ys, *([] if len(ys) > 2 else [x.new_empty(0)]), h, x.new_empty((tokens, rows[0]) if gated and keep else 0)


@torch.library.custom_op("mlfs::joint_linear_backward", mutates_args=())
def _joint_linear_backward(
    dys: list[Tensor],
    x: Tensor | None,
    h: Tensor | None,
    weights: list[Tensor],
    lora_a: list[Tensor],
    lora_b: list[Tensor],
    scales: list[float],
    trains: list[bool],
    needs_dx: bool,
    columns: int,
    z: Tensor | None,
    up: Tensor | None,
    residual: Tensor | None,
) -> list[Tensor]:
    """[dx (empty unless needed), dA and dB of each stage that trains], from the dy of each layer; gated, from dy, z and
    `up`, which is y_1. `residual`, of x's shape, is added to dx."""
    leading, grads = dys[0].shape[:-1], [dy.reshape(-1, dy.shape[-1]) for dy in dys]
    flat = None if x is None else x.reshape(-1, columns)
    added = None if residual is None or not needs_dx else residual.reshape(-1, columns)
    backend = backend_of(dys[0], *weights, *lora_a, *lora_b, z, up)
    if backend == "triton":
        from mlfs.kernels import joint as kernels
        from mlfs.kernels.product import activation_backward

        if z is not None and up is not None:
            dz, d_up = activation_backward(grads[0], z, up.reshape(z.shape), "silu_mul")
            grads = [dz, d_up if d_up is not None else dz]
        rows = [dy.shape[1] for dy in grads]
        given = _layers(weights, [], lora_a, lora_b, scales, rows)
        dx, gradients = kernels.backward(grads, flat, h, given, Wanted(trains, needs_dx, columns), added)
        return [dx.view(*leading, columns) if needs_dx else dx, *gradients]
    stages = _stages_of_each(len(weights), lora_a, lora_b, scales)
    count, width = len(lora_a) // len(weights), sum(a.shape[0] for a in stages[0][0])
    hs = [None if h is None else h[:, i * width : (i + 1) * width] for i in range(len(weights))]
    if backend == "cpp":
        if z is not None and up is not None:
            grads = list(cpp().activation_backward(grads[0], z, up.reshape(z.shape), ACTIVATIONS.index("silu_mul")))
        layers = [(w, None, *mine, [0, dy.shape[1]]) for w, mine, dy in zip(weights, stages, grads, strict=True)]
        own = [trains[i * count : (i + 1) * count] for i in range(len(weights))]
        dx, of_layers = cpp().linear_backward(grads, flat, hs, layers, own, needs_dx, columns)
        dx = dx if added is None else dx.add_(added)
        return [dx.view(*leading, columns) if needs_dx else dx, *(g for mine in of_layers for g in mine)]
    if z is not None and up is not None:
        other, wide = up.reshape(z.shape), grads[0]
        grads = [torch.ops.aten.silu_backward(wide * other, z), wide * torch.nn.functional.silu(z)]
    total, gradients = dys[0].new_zeros((grads[0].shape[0] if needs_dx else 0, columns)), []
    for i, (a, b, c) in enumerate(stages):
        own_trains = trains[i * count : (i + 1) * count]
        spans = [0, grads[i].shape[1]]
        dx, _, *more = _sliced_linear_backward(
            grads[i], flat, hs[i], weights[i], a, b, c, spans, own_trains, needs_dx, columns, "none", None, None
        )
        total, gradients = total + dx, gradients + more
    total = total if added is None else total + added
    return [total.view(*leading, columns) if needs_dx else total, *gradients]


@_joint_linear_backward.register_fake
def _(dys, x, h, weights, lora_a, lora_b, scales, trains, needs_dx, columns, z, up, residual):
    dx = dys[0].new_empty((*dys[0].shape[:-1], columns) if needs_dx else (0, columns))
    stages = [(a, b) for a, b, train in zip(lora_a, lora_b, trains, strict=True) if train]
    return [dx, *(torch.empty_like(t) for pair in stages for t in pair)]


def _takes_kernels(tokens: int, keep: bool) -> bool:
    """Few tokens, as in decoding, have kernels of their own, layer by layer."""
    from mlfs.kernels import decode

    return keep or tokens > decode.MAX_TOKENS


def _layers(
    weights: list[Tensor],
    biases: list[Tensor],
    lora_a: list[Tensor],
    lora_b: list[Tensor],
    scales: list[float],
    rows: list[int],
) -> list[LowRankLinear]:
    stages = _stages_of_each(len(weights), lora_a, lora_b, scales)
    return [
        LowRankLinear(weight, biases[i] if biases else None, *stages[i], [0, rows[i]])
        for i, weight in enumerate(weights)
    ]


def _stages_of_each(
    layers: int, lora_a: list[Tensor], lora_b: list[Tensor], scales: list[float]
) -> list[tuple[list[Tensor], list[Tensor], list[float]]]:
    count = len(lora_a) // layers
    parts = [slice(i * count, (i + 1) * count) for i in range(layers)]
    return [(lora_a[part], lora_b[part], scales[part]) for part in parts]


def _keep(ctx, inputs, output) -> None:
    x, weights, biases, lora_a, lora_b, ctx.scales, rows, ctx.gated, _ = inputs
    y, up, third, h, z = output
    ctx.set_materialize_grads(False)
    ctx.trains = [a.requires_grad or b.requires_grad for a, b in zip(lora_a, lora_b, strict=True)]
    ctx.layers, ctx.stages, ctx.biases = len(weights), len(lora_a), len(biases)
    ctx.columns, ctx.kind = x.shape[-1], x.dtype
    ctx.shapes = [t.shape for t in (y, up, third)[: len(rows)]]
    kept = [x, h] if any(ctx.trains) else []
    kept += [z, up] if ctx.gated else []
    ctx.save_for_backward(*kept, *weights, *lora_a, *lora_b)


def _gradients(
    ctx, given: Sequence[Tensor | None], more: Tensor | None
) -> tuple[Tensor | None, list[Tensor | None], list[Tensor | None]]:
    """(dx, dA of each stage, dB of each) from the gradients of the layers' outputs and of the x that is carried on."""
    some = next((dy for dy in given if dy is not None), None)
    if some is None:
        nothing: list[Tensor | None] = [None] * ctx.stages
        return more, nothing, nothing
    saved = list(ctx.saved_tensors)
    x, h = (saved.pop(0), saved.pop(0)) if any(ctx.trains) else (None, None)
    z, up = (saved.pop(0), saved.pop(0)) if ctx.gated else (None, None)
    dys = [
        (some.new_zeros(shape) if dy is None else dy).to(ctx.kind) for dy, shape in zip(given, ctx.shapes, strict=False)
    ]
    ends = ctx.layers, ctx.layers + ctx.stages
    weights, lora_a, lora_b = saved[: ends[0]], saved[ends[0] : ends[1]], saved[ends[1] :]
    needs_dx = ctx.needs_input_grad[0]
    out = _joint_linear_backward(
        dys, x, h, weights, lora_a, lora_b, ctx.scales, ctx.trains, needs_dx, ctx.columns, z, up, more
    )
    return out[0] if needs_dx else None, *of_each_stage(ctx.trains, out[1:])


def _setup_context(ctx, inputs, output) -> None:
    _, up, third, h, z = output
    rows, gated = inputs[6:8]
    ctx.mark_non_differentiable(h, z, *([up, third] if gated else [] if len(rows) > 2 else [third]))
    _keep(ctx, inputs, output)


def _backward(ctx, dy_0, dy_1, dy_2, dh, dz):
    given = [dy_0] if ctx.gated else [dy_0, dy_1, dy_2][: ctx.layers]
    dx, da, db = _gradients(ctx, given, None)
    numbers = None if ctx.scales else []  # an empty list of numbers looks like one of tensors to torch.library
    return dx, [None] * ctx.layers, [None] * ctx.biases, da, db, numbers, None, None, None


_joint_linear.register_autograd(_backward, setup_context=_setup_context)


class _Carrying(torch.autograd.Function):
    """The operator, and x: an operator cannot hand x on, as its outputs share no memory with its inputs."""

    @staticmethod
    def forward(ctx, x, weights, biases, scales, rows, stages, *lora):
        inputs = x, weights, biases, list(lora[:stages]), list(lora[stages:]), scales, rows, False, True
        output = _joint_linear(*inputs)
        _keep(ctx, inputs, output)
        return *output[: len(rows)], x.view_as(x)

    @staticmethod
    def backward(ctx, *given):
        dx, da, db = _gradients(ctx, given[:-1], given[-1])
        return dx, *[None] * 5, *da, *db
