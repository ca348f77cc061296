"""Linear layers that read the same x (query, key and value; gate and up) in one call:

    y_i = x · W_i[:m_i, :n]ᵀ + b_i[:m_i] + Σ_s c_is · (x · A_is[:, :n]ᵀ) · B_is[:m_i]ᵀ
    gated, of two layers: y = SiLU(y_0) · y_1

Shapes and types are those of `mlfs.ops.sliced_linear`, whose calls these are; kernels make every y in one launch, after
one for all adapters. Backward, dx = Σ_i dz_i · W_i + Σ_is g_is · A_is (g_is = c_is · dz_i · B_is) is summed in the
accumulator of one product; separate calls write every summand and add them up in passes of their own.
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
from mlfs.ops.backend import in_autocast_type, run, runs_as_operators
from mlfs.ops.backends.table import implements
from mlfs.ops.layer import NOTHING, Epilogue, FlatLayers, LowRankLinear, Wanted, flatten, unflatten
from mlfs.ops.sliced_linear import activation_backward, linear_backward, linear_forward, sliced_linear_reference

__all__ = ["joint_linear", "joint_linear_reference", "may_join"]


def joint_linear_reference(x: Tensor, layers: Sequence[LowRankLinear], gated: bool = False) -> list[Tensor]:
    """Computes the formula in plain, differentiable PyTorch."""
    ys = [sliced_linear_reference(x, layer) for layer in layers]
    if gated:
        return [torch.nn.functional.silu(ys[0]) * ys[1]]
    return ys


def may_join(layers: Sequence[LowRankLinear]) -> bool:
    """Says whether `joint_linear` is for layers.

    They are two or three that read leading rows, alike in their stages, in having biases and in their types.
    """
    if not 2 <= len(layers) <= 3 or not all(reads_leading_rows(layer) for layer in layers):
        return False
    # One launch reads every A, of all stages of all layers: they have one shape.
    shapes_of_a = {lora_a.shape for layer in layers for lora_a in layer.lora_a}
    return len({_likeness(layer) for layer in layers}) == 1 and len(shapes_of_a) <= 1


def reads_leading_rows(layer: LowRankLinear) -> bool:
    """Says whether the layer reads one span of rows, from the first on."""
    return len(layer.spans) == 2 and layer.spans[0] == 0


def _likeness(layer: LowRankLinear) -> tuple[Any, ...]:
    """What layers have to share to run in one launch."""
    ranks = tuple(lora_b.shape[1] for lora_b in layer.lora_b)
    dtypes = tuple(None if t is None else t.dtype for t in (layer.weight, layer.bias, *layer.lora_b))
    return len(layer.lora_a), ranks, dtypes


def joint_linear(
    x: Tensor, layers: Sequence[LowRankLinear], gated: bool = False, returns_input: bool = False
) -> list[Tensor]:
    """Computes the formula above, with W and b frozen.

    Args:
        x: (..., n), floating point; under autocast cast to its type.
        layers: two or three that `may_join`; if gated, two of as many rows.
        returns_input: also return x, for what else reads it: the gradient that comes back through it is added by the
            product that makes dx. Not with gated layers.

    Returns:
        [y_0, y_1, ...], or, gated, [y]; and x, if it `returns_input`.

    Raises:
        MLFSError: layers that cannot go together.
    """
    may_gate = len(layers) == 2 and layers[0].rows == layers[1].rows and not returns_input
    if not may_join(layers) or (gated and not may_gate):
        raise MLFSError(
            f"{len(layers)} layers of {', '.join(str(layer.rows) for layer in layers)} rows: expected two or three "
            "with the same number of stages, of one rank and type, and all with a bias or none; gated, two of one "
            "size, and x is not carried on"
        )
    given, x = x, in_autocast_type(x)  # `given` is what others read, in its own type
    if not runs_as_operators():
        ys = joint_linear_reference(x, layers, gated)
        return [*ys, given] if returns_input else ys
    flat = flatten(layers)
    leaves = (x, *flat.lora_a, *flat.lora_b)
    keep = torch.is_grad_enabled() and any(t.requires_grad for t in leaves)
    # A copy in another type is nothing that others read: their gradients are added by autograd, as ever.
    if returns_input and keep and x is given:
        return list(_joint_linear_returning_input(x, *flat, gated, keep))
    outputs = _joint_linear(x, *flat, gated, keep)
    ys = list(outputs[: _results((x, *flat, gated, keep))])
    return [*ys, given] if returns_input else ys


# ---- what backends implement, on 2-d tensors -------------------------------------------------------------------------


def joint_forward(
    x: Tensor, layers: Sequence[LowRankLinear], gated: bool, keep: bool
) -> tuple[list[Tensor], Tensor, Tensor]:
    """Computes the formula for x (T, n), by the backend for x.

    Returns:
        ([y_i (T, m_i)], h (T, R), pre (T, m_0)): h are the c · x Aᵀ of all stages of all layers side by side. Gated,
        y_0 = SiLU(pre) · y_1. h and pre are for the backward pass; without `keep` they are not to be read, nor is,
        gated, y_1; pre is empty unless gated.
    """
    return run("joint_forward", (x,), x, layers, gated, keep)


@implements("reference", "joint_forward")
def _joint_forward(
    x: Tensor, layers: Sequence[LowRankLinear], gated: bool, keep: bool
) -> tuple[list[Tensor], Tensor, Tensor]:
    # One after the other, the first one last: gated, it reads what the second makes.
    others = [linear_forward(x, layer, NOTHING, keep) for layer in layers[1:]]
    epilogue = NOTHING
    if gated:
        epilogue = Epilogue("silu_mul", operand=others[0][0])
    first = linear_forward(x, layers[0], epilogue, keep)
    ys = [y for y, _, _ in (first, *others)]
    h = x.new_empty(0)
    if keep:  # (T, R)
        h = torch.cat([h_of_layer for _, h_of_layer, _ in (first, *others)], 1)
    return ys, h, first[2]


def joint_backward(
    dys: Sequence[Tensor],
    x: Tensor | None,
    h: Tensor | None,
    layers: Sequence[LowRankLinear],
    wanted: Wanted,
    residual: Tensor | None = None,
) -> tuple[Tensor, list[Tensor]]:
    """Computes the gradients of the linear part, by the backend for these tensors.

    Args:
        dys: of each layer (T, m_i). x (T, n), h (T, R): of the forward pass; None where no stage trains.
        wanted: with the stages of all layers, one layer after the other.
        residual: (T, n), added to dx.

    Returns:
        (dx (T, n), or (0, n) where it is not wanted; [dA, dB, ...] of the stages that train).
    """
    tensors = [t for layer in layers for t in layer.tensors]
    return run("joint_backward", (dys[0], *tensors), dys, x, h, layers, wanted, residual)


@implements("reference", "joint_backward")
def _joint_backward(
    dys: Sequence[Tensor],
    x: Tensor | None,
    h: Tensor | None,
    layers: Sequence[LowRankLinear],
    wanted: Wanted,
    residual: Tensor | None = None,
) -> tuple[Tensor, list[Tensor]]:
    stages = len(wanted.trains) // len(layers)
    tokens = dys[0].shape[0] if wanted.dx else 0
    dx = dys[0].new_zeros((tokens, wanted.columns))
    gradients: list[Tensor] = []
    rank = 0  # of all layers' side by side, the first of this layer
    for i, (dy, layer) in enumerate(zip(dys, layers, strict=True)):
        h_of_layer = h
        if h is not None:
            h_of_layer = h[:, rank : rank + sum(layer.ranks)]
        rank += sum(layer.ranks)
        own = Wanted(wanted.trains[i * stages : (i + 1) * stages], wanted.dx, wanted.columns)
        summand, of_stages = linear_backward(dy, x, h_of_layer, layer, own)
        dx = dx + summand  # in the order of the layers, so that two runs agree
        gradients += of_stages
    if residual is not None:
        dx = dx + residual
    return dx, gradients


# ---- the operator ----------------------------------------------------------------------------------------------------


@torch.library.custom_op("mlfs::joint_linear", mutates_args=())
def _joint_linear(
    x: Tensor,
    weights: list[Tensor],
    biases: list[Tensor],
    lora_a: list[Tensor],
    lora_b: list[Tensor],
    scales: list[float],
    spans: list[int],
    gated: bool,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(y_0, y_1, y_2, h, pre): see `joint_forward`; y_2 is empty for two layers, as are h, pre and, gated, y_1 without
    `keep`."""
    layers = unflatten(weights, biases, lora_a, lora_b, scales, spans)
    ys, h, pre = joint_forward(flat_rows(x), layers, gated, keep)
    shown = [y.view(*x.shape[:-1], y.shape[1]) for y in ys]  # (..., m_i)
    if gated and not keep:
        shown[1] = x.new_empty(0)
    if len(layers) == 2:  # an operator has the same number of outputs always
        shown.append(x.new_empty(0))
    if not keep:
        h = x.new_empty(0)
    return shown[0], shown[1], shown[2], h, pre


@_joint_linear.register_fake
def _(x, weights, biases, lora_a, lora_b, scales, spans, gated, keep):
    tokens, rows = tokens_of(x), spans[1::2]
    ys = [x.new_empty((*x.shape[:-1], size)) for size in rows]
    if gated and not keep:
        ys[1] = x.new_empty(0)
    if len(ys) == 2:
        ys.append(x.new_empty(0))
    h, pre = x.new_empty(0), x.new_empty(0)
    if keep:
        h = x.new_empty((tokens, sum(stage.shape[0] for stage in lora_a)))
    if gated and keep:
        pre = x.new_empty((tokens, rows[0]))
    return *ys, h, pre


def _results(inputs: Sequence[Any]) -> int:
    """Of the operator's outputs, how many are results."""
    _, weights, *_, gated, _ = inputs
    return 1 if gated else len(weights)


@torch.library.custom_op("mlfs::joint_linear_backward", mutates_args=())
def _joint_linear_backward(
    dys: list[Tensor],
    x: Tensor | None,
    h: Tensor | None,
    pre: Tensor | None,
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
) -> list[Tensor]:
    """[dx (empty unless needed), dA and dB of each stage that trains], from the dy of each layer; gated, from dy, pre
    and `operand`, which is y_1. `residual`, of x's shape, is added to dx."""
    layers = unflatten(weights, [], lora_a, lora_b, scales, spans)
    leading = dys[0].shape[:-1]
    d_pres = [flat_rows(dy) for dy in dys]
    if pre is not None and operand is not None:
        d_pre, d_operand = activation_backward(d_pres[0], pre, operand.reshape(pre.shape), "silu_mul")
        assert d_operand is not None
        d_pres = [d_pre, d_operand]
    added = flat_rows(residual) if needs_dx else None
    wanted = Wanted(trains, needs_dx, columns)  # `trains` is of all layers' stages
    dx, gradients = joint_backward(d_pres, flat_rows(x), h, layers, wanted, added)
    if needs_dx:
        dx = dx.view(*leading, columns)
    return [dx, *gradients]


@_joint_linear_backward.register_fake
def _(
    dys, x, h, pre, operand, residual, weights, lora_a, lora_b, scales, spans, trains, needs_dx, columns
):  # fmt: skip
    dx = dys[0].new_empty((*dys[0].shape[:-1], columns) if needs_dx else (0, columns))
    return [dx, *like_trained(lora_a, lora_b, trains)]


def _keep(ctx: Any, inputs: Sequence[Any], output: Sequence[Tensor]) -> None:
    x, *layers, gated, _ = inputs
    *ys, h, pre = output
    ctx.shapes = [y.shape for y in ys[: _results(inputs)]]  # for results that nothing comes back through
    others = (pre, ys[1]) if gated else (None, None)
    keep_layers(ctx, x, FlatLayers(*layers), for_adapters=(x, h), others=others)


def _gradients(ctx: Any, of_outputs: Sequence[Tensor | None], of_input: Tensor | None) -> tuple[Any, ...]:
    given = of_outputs[: len(ctx.shapes)]
    some = next((dy for dy in given if dy is not None), None)
    if some is None:  # nothing comes back through the layers
        return of_input, *gradients_of_layers(ctx, None), None, None
    dys = []  # in x's type; zeros for a result that is not read
    for dy, shape in zip(given, ctx.shapes, strict=True):
        whole = some.new_zeros(shape) if dy is None else dy
        dys.append(whole.to(ctx.dtype))
    needs_dx = ctx.needs_input_grad[0]
    (x, h, pre, operand), layers = kept_layers(ctx)
    dx, *of_stages = _joint_linear_backward(
        dys, x, h, pre, operand, of_input, *layers, ctx.trains, needs_dx, ctx.columns
    )
    return wanted_if(needs_dx, dx), *gradients_of_layers(ctx, of_stages), None, None


_joint_linear_returning_input = differentiable(_joint_linear, _keep, _gradients, _results)
