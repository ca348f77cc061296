"""Normalisation over the leading n numbers of the residual stream.

    s = residual + dropout(x)
    layer_norm: y = (s − mean(s)) / sqrt(var(s) + eps) · w[:n] + b[:n]        (Ba et al., arXiv 1607.06450)
    rms_norm:   y = w[:n] · cast(s / sqrt(mean(s²) + eps))                    (Zhang and Sennrich, arXiv 1910.07467)

Shapes: x, residual, s and y (..., n), w and b (N,), n ≤ N. The statistics are those of the n numbers that are there.

In code s is `total`, and T the number of tokens.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mlfs.errors import MLFSError
from mlfs.ops.autograd import differentiable, flat_rows, wanted_if
from mlfs.ops.backend import autocast_type, direct_implementation, has_implementation, run
from mlfs.ops.backends.table import implements
from mlfs.ops.layer import Dropout, Norm

__all__ = ["add_norm", "add_norm_reference", "layer_norm", "rms_norm"]


def add_norm_reference(
    x: Tensor, residual: Tensor | None, norm: Norm, statistics: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """Computes (y, s) of the formula without dropout, in plain, differentiable PyTorch."""
    columns = x.shape[-1]
    total = x
    if residual is not None:
        total = residual + x
    weight, bias, eps, rms = norm.cut(columns)
    if not rms:
        return torch.nn.functional.layer_norm(total, (columns,), weight, bias, eps), total
    if statistics is None:
        statistics = torch.promote_types(total.dtype, torch.float32)
    wide = total.to(statistics)  # in fp16, squares of some hundreds overflow
    y = (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(total.dtype)
    if weight is not None:
        y = weight * y
    if bias is not None:
        y = y + bias
    return y, total


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """Applies layer normalisation to x (..., n) with the leading n of weight and bias (N,)."""
    return add_norm(x, None, Norm(weight, bias, eps, rms=False))[0]


def rms_norm(x: Tensor, weight: Tensor, eps: float, statistics: torch.dtype | None = None) -> Tensor:
    """Applies root-mean-square normalisation to x (..., n) with the leading n of weight (N,).

    The scaled x is cast back before it meets the weight, as the Llama family does.
    """
    return add_norm(x, None, Norm(weight, None, eps, rms=True), statistics=statistics)[0]


def add_norm(
    x: Tensor,
    residual: Tensor | None,
    norm: Norm,
    p: float = 0.0,
    seed: Tensor | None = None,
    statistics: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Computes (y, s) of the formula above, in one pass over memory where there are kernels for it.

    Args:
        x, residual: (..., n), floating point; residual may be None. s has the wider of their types.
        norm: its weight and bias are (N,) or None.
        p: probability of dropout, 0 to below 1. The mask is drawn from `seed` and drawn again in the backward pass.
        seed: one int64 on x's device; by default drawn from torch's generator of that device.
        statistics: the type that the reference takes them in; by default float32, or float64 for float64 x. (The Llama
            family takes float32 always.)

    Raises:
        MLFSError: p outside its range.
    """
    if not 0.0 <= p < 1.0:
        raise MLFSError(f"p={p}: a probability of dropout is at least 0 and below 1")
    weight, bias, eps, rms = norm
    if not p:  # a mask needs a seed, which is drawn below
        direct = direct_implementation("direct_add_norm", x, residual, weight, bias)
        if direct is not None:
            y, total = direct(flat_rows(x), flat_rows(residual), norm)
            return y.view(x.shape), total.view(x.shape)
    if seed is None and not has_implementation("add_norm", x, residual, weight, bias):
        x = torch.nn.functional.dropout(x, p)  # as torch's own modules: a mask that is kept is cheaper here
        return add_norm_reference(x, residual, norm, statistics)
    # The type of s; not by `_dtypes`, as torch.compile cannot trace torch.result_type.
    dtype = x.dtype
    if residual is not None:
        dtype = torch.promote_types(x.dtype, residual.dtype)
    if not rms and autocast_type(x) is not None:  # as autocast does with torch's own
        x = x.float()
        if residual is not None:
            residual = residual.float()
    if p and seed is None:
        seed = torch.randint(2**62, (1,), device=x.device)
    # Where s is x, what comes back through it is added in the pass that makes dx.
    if residual is None and not p:
        y, _, total = _add_norm_returning_input(x, None, weight, bias, eps, rms, 0.0, None)
    else:
        y, total = _add_norm(x, residual, weight, bias, eps, rms, p, seed)
    return y, total.to(dtype)


# ---- what backends implement, on 2-d tensors -------------------------------------------------------------------------


@implements("reference", "add_norm")
def _add_norm_in_pytorch(
    x: Tensor, residual: Tensor | None, norm: Norm, dropout: Dropout, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Computes (y of `dtype`, s) for x (T, n); s is x itself where nothing is added or dropped."""
    if dropout.p:
        x = x * _mask(x, dropout)
    return add_norm_reference(x, residual, norm)


@implements("reference", "add_norm_backward")
def _add_norm_backward_in_pytorch(
    dy: Tensor, of_total: Tensor | None, total: Tensor, norm: Norm, dropout: Dropout, trains: bool
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Computes (dx, d_residual or None where it is dx, dw and db (n,) or None unless the norm `trains`).

    of_total: what comes back through s. All in fp32 or wider, and with y = unit · w + b:
    ds = (dy · w − unit · mean(dy · w · unit) − mean(dy · w)) / sqrt(var + eps), without the last mean in an RMS norm.
    """
    columns = total.shape[-1]
    wide = total.to(torch.promote_types(total.dtype, torch.float32))
    centred = wide  # (T, n)
    if not norm.rms:
        centred = wide - wide.mean(-1, keepdim=True)
    scale = torch.rsqrt(centred.pow(2).mean(-1, keepdim=True) + norm.eps)
    unit, slope = centred * scale, dy.to(wide.dtype)  # scale: (T, 1)
    d_weight, d_bias = None, None
    if trains:
        d_weight, d_bias = (slope * unit).sum(0), slope.sum(0).clone()
    if norm.weight is not None:
        slope = slope * norm.weight[:columns]
    d_total = slope - unit * (slope * unit).mean(-1, keepdim=True)
    if not norm.rms:
        d_total = d_total - slope.mean(-1, keepdim=True)
    d_total = d_total * scale
    if of_total is not None:
        d_total = d_total + of_total
    d_total = d_total.to(total.dtype)
    if dropout.p:
        return d_total * _mask(d_total, dropout), d_total, d_weight, d_bias
    return d_total, None, d_weight, d_bias


def _mask(x: Tensor, dropout: Dropout) -> Tensor:
    """1 / (1 - p) where a number is kept, 0 where it is dropped."""
    # Of a generator of its own, so that forward and backward pass draw the same without a mask that is kept.
    generator = torch.Generator(x.device).manual_seed(dropout.number)
    drawn = torch.rand(x.shape, generator=generator, device=x.device)
    return drawn.ge(dropout.p).to(x.dtype) / (1 - dropout.p)


# ---- the operator ----------------------------------------------------------------------------------------------------


@torch.library.custom_op("mlfs::add_norm", mutates_args=())
def _add_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    rms: bool,
    p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """(y, s); s is empty where it is x."""
    norm, dropout = Norm(weight, bias, eps, rms), Dropout(p, seed)
    _, dtype = _dtypes(x, residual, weight, rms)
    on = (x, residual, weight, bias)
    y, total = run("add_norm", on, flat_rows(x), flat_rows(residual), norm, dropout, dtype)
    if residual is None and not p:
        return y.view(x.shape), x.new_empty(0)
    return y.view(x.shape), total.view(x.shape)


@_add_norm.register_fake
def _(x, residual, weight, bias, eps, rms, p, seed):
    of_total, of_y = _dtypes(x, residual, weight, rms)
    changes = residual is not None or p > 0
    return x.new_empty(x.shape, dtype=of_y), x.new_empty(x.shape if changes else 0, dtype=of_total)


def _dtypes(x: Tensor, residual: Tensor | None, weight: Tensor | None, rms: bool) -> tuple[torch.dtype, torch.dtype]:
    """Of s and y: as torch's layer_norm and the Llama family's product with the weight have them."""
    of_total = x.dtype
    if residual is not None:
        of_total = torch.result_type(x, residual)
    of_y = of_total
    if rms and weight is not None:
        of_y = torch.promote_types(of_total, weight.dtype)
    return of_total, of_y


@torch.library.custom_op("mlfs::add_norm_backward", mutates_args=())
def _add_norm_backward(
    dy: Tensor,
    of_total: Tensor | None,
    total: Tensor,
    weight: Tensor | None,
    eps: float,
    rms: bool,
    p: float,
    seed: Tensor | None,
    trains: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dx, d_residual or empty where it is dx, dw and db (n,), empty unless the norm `trains`)."""
    norm, dropout = Norm(weight, None, eps, rms), Dropout(p, seed)
    on = (dy, of_total, total, weight)
    flat = flat_rows(dy), flat_rows(of_total), flat_rows(total)
    dx, d_residual, d_weight, d_bias = run("add_norm_backward", on, *flat, norm, dropout, trains)
    # A new empty one each time: outputs of an operator share no memory.
    empty = [dy.new_empty(0) for _ in range(3)]
    d_residual = empty[0] if d_residual is None else d_residual.view(total.shape)
    if d_weight is None:
        d_weight = empty[1]
    if d_bias is None:
        d_bias = empty[2]
    return dx.view(total.shape), d_residual, d_weight, d_bias


@_add_norm_backward.register_fake
def _(dy, of_total, total, weight, eps, rms, p, seed, trains):
    d_weight, d_bias = dy.new_empty(0), dy.new_empty(0)
    if trains:
        dtype = torch.promote_types(total.dtype, torch.float32)
        d_weight, d_bias = (total.new_empty(total.shape[-1], dtype=dtype) for _ in range(2))
    d_residual = total.new_empty(total.shape) if p else dy.new_empty(0)
    return total.new_empty(total.shape), d_residual, d_weight, d_bias


def _keep(ctx: Any, inputs: Sequence[Any], output: Sequence[Tensor]) -> None:
    x, residual, weight, bias, eps, rms, p, seed = inputs
    ctx.set_materialize_grads(False)
    ctx.options = eps, rms, p
    ctx.adds = residual is not None
    total = output[1] if ctx.adds or p else x  # s
    ctx.save_for_backward(total, weight, bias, seed)


def _gradients(ctx: Any, of_outputs: Sequence[Tensor | None], of_input: Tensor | None) -> tuple[Any, ...]:
    dy, of_total = of_outputs
    total, weight, bias, seed = ctx.saved_tensors
    eps, rms, p = ctx.options
    if not ctx.adds and not p:  # s is x: the operator's own is empty
        of_total = of_input
        if dy is None:
            return of_total, *[None] * 7
    if dy is None:
        dy = torch.zeros_like(total)
    needs_weight, needs_bias = ctx.needs_input_grad[2:4]
    trains = needs_weight or needs_bias
    dx, d_residual, d_weight, d_bias = _add_norm_backward(dy, of_total, total, weight, eps, rms, p, seed, trains)
    if not p:
        d_residual = dx
    return (
        dx,
        wanted_if(ctx.adds, d_residual),
        _whole(d_weight, weight, needs_weight),
        _whole(d_bias, bias, needs_bias),
        *[None] * 4,
    )


def _whole(gradient: Tensor, parameter: Tensor | None, wanted: bool) -> Tensor | None:
    """The gradient of a parameter that needs one: zero off the columns that were read."""
    if not wanted or parameter is None:
        return None
    whole = torch.zeros_like(parameter)
    whole[: gradient.shape[0]] = gradient
    return whole


_add_norm_returning_input = differentiable(_add_norm, _keep, _gradients, results=lambda inputs: 2)
