"""Normalisation over the leading n numbers of the residual stream.

    s = residual + dropout(x)
    layer_norm: y = (s − mean(s)) / sqrt(var(s) + eps) · w[:n] + b[:n]        (Ba et al., arXiv 1607.06450)
    rms_norm:   y = w[:n] · cast(s / sqrt(mean(s²) + eps))                    (Zhang and Sennrich, arXiv 1910.07467)

Shapes: x, residual, s and y (..., n), w and b (N,), n ≤ N. The statistics are those of the n numbers that are there.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from mlfs.errors import MLFSError
from mlfs.ops.backend import autocast_type, backend_of, cpp, is_direct

__all__ = ["add_norm", "add_norm_reference", "layer_norm", "rms_norm"]


def add_norm_reference(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    rms: bool,
    statistics: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """(y, s) of the formula without dropout, in plain, differentiable PyTorch."""
    s = x if residual is None else residual + x
    n = x.shape[-1]
    w = None if weight is None else weight[:n]
    b = None if bias is None else bias[:n]
    if not rms:
        return torch.nn.functional.layer_norm(s, (n,), w, b, eps), s
    wide = s.to(torch.promote_types(s.dtype, torch.float32) if statistics is None else statistics)
    y = (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(s.dtype)
    y = y if w is None else w * y
    return y if b is None else y + b, s


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """Layer normalisation of x (..., n) with the leading n of weight and bias (N,)."""
    return add_norm(x, None, weight, bias, eps, rms=False)[0]


def rms_norm(x: Tensor, weight: Tensor, eps: float, statistics: torch.dtype | None = None) -> Tensor:
    """Root-mean-square normalisation of x (..., n) with the leading n of weight (N,).

    The scaled x is cast back before it meets the weight, as the Llama family does.
    """
    return add_norm(x, None, weight, None, eps, rms=True, statistics=statistics)[0]


def add_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    rms: bool,
    p: float = 0.0,
    seed: Tensor | None = None,
    statistics: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """(y, s) of the formula above, in one pass over memory where there are kernels for it.

    Args:
        x, residual: (..., n), floating point; residual may be None. s has the wider of their types.
        weight, bias: (N,) or None.
        rms: root-mean-square instead of layer normalisation.
        p: probability of dropout, 0 to below 1. The mask is drawn from `seed` and drawn again in the backward pass.
        seed: one int64 on x's device; by default drawn from torch's generator of that device.
        statistics: the type that the reference takes them in; by default float32, or float64 for float64 x. (The Llama
            family takes float32 always.)

    Raises:
        MLFSError: p outside its range.
    """
    if not 0.0 <= p < 1.0:
        raise MLFSError(f"p={p}: a probability of dropout is at least 0 and below 1")
    if not p and is_direct(x, residual, weight, bias):
        return _by_extension(x, residual, weight, bias, eps, rms)
    if seed is None and backend_of(x, residual, weight, bias) == "reference":
        x = torch.nn.functional.dropout(x, p)  # as torch's own modules: a mask that is kept is cheaper here
        return add_norm_reference(x, residual, weight, bias, eps, rms, statistics)
    # that of s; not by `_types`, as torch.compile cannot trace torch.result_type
    kind = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    if not rms and autocast_type(x) is not None:  # as autocast does with torch's own
        x, residual = (x.float(), None) if residual is None else (x, residual.float())
    if p and seed is None:
        seed = torch.randint(2**62, (1,), device=x.device)
    if residual is None and not p:
        y, s = _Carrying.apply(x, weight, bias, eps, rms)
    else:
        y, s = _add_norm(x, residual, weight, bias, eps, rms, p, seed)
    return y, s.to(kind)


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
    n, adds = x.shape[-1], residual is not None or p > 0
    backend = backend_of(x, residual, weight, bias)
    if backend == "cpp":
        y, s = _by_extension(x, residual, weight, bias, eps, rms, p, int(seed or 0))
        return y, s if adds else x.new_empty(0)
    if backend == "triton":
        from mlfs.kernels import norm as kernels

        flat = None if residual is None else residual.reshape(-1, n)
        _, kind = _types(x, residual, weight, rms)
        y, s = kernels.forward(x.reshape(-1, n), flat, weight, bias, eps, rms, p, seed, kind)
        return y.view(x.shape), s.view(x.shape) if adds else x.new_empty(0)
    if p:
        x = x * _mask(x, p, seed)
    y, s = add_norm_reference(x, residual, weight, bias, eps, rms)
    return y, s if adds else x.new_empty(0)


@_add_norm.register_fake
def _(x, residual, weight, bias, eps, rms, p, seed):
    of_s, of_y = _types(x, residual, weight, rms)
    y = x.new_empty(x.shape, dtype=of_y)
    return y, x.new_empty(x.shape if residual is not None or p else 0, dtype=of_s)


def _types(x: Tensor, residual: Tensor | None, weight: Tensor | None, rms: bool) -> tuple[torch.dtype, torch.dtype]:
    """Of s and y: as torch's layer_norm and the Llama family's product with the weight have them."""
    kind = x.dtype if residual is None else torch.result_type(x, residual)
    return kind, torch.promote_types(kind, weight.dtype) if rms and weight is not None else kind


@torch.library.custom_op("mlfs::add_norm_backward", mutates_args=())
def _add_norm_backward(
    dy: Tensor,
    ds: Tensor | None,
    s: Tensor,
    weight: Tensor | None,
    eps: float,
    rms: bool,
    p: float,
    seed: Tensor | None,
    trains: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dx, d_residual or empty where it is dx, dw and db (n,), empty unless the norm `trains`)."""
    n = s.shape[-1]

    def nothing() -> Tensor:  # a new one each time: outputs of an operator share no memory
        return dy.new_empty(0)

    backend = backend_of(dy, ds, s, weight)
    if backend == "cpp":
        more = None if ds is None else ds.reshape(-1, n)
        options = eps, rms, p, int(seed or 0), trains
        grads = cpp().add_norm_backward(dy.reshape(-1, n), more, s.reshape(-1, n), *_cut(n, weight), *options)
        dx, kept, dw, db = grads
        return dx.view(s.shape), kept.view(s.shape) if p else kept, dw, db
    if backend == "triton":
        from mlfs.kernels import norm as kernels

        more = None if ds is None else ds.reshape(-1, n)
        flat = dy.reshape(-1, n), more, s.reshape(-1, n)
        dx, d_residual, dw, db = kernels.backward(*flat, weight, eps, rms, p, seed, trains)
        kept = d_residual.view(s.shape) if p else nothing()
        return dx.view(s.shape), kept, nothing() if dw is None else dw, nothing() if db is None else db
    wide = s.to(torch.promote_types(s.dtype, torch.float32))
    centred = wide if rms else wide - wide.mean(-1, keepdim=True)
    scale = torch.rsqrt(centred.pow(2).mean(-1, keepdim=True) + eps)
    unit, d = centred * scale, dy.to(wide.dtype)
    sums = (d * unit).reshape(-1, n).sum(0), d.reshape(-1, n).sum(0).clone()
    dw, db = sums if trains else (nothing(), nothing())
    d = d if weight is None else d * weight[:n]
    g = d - unit * (d * unit).mean(-1, keepdim=True)
    g = (g if rms else g - d.mean(-1, keepdim=True)) * scale
    g = (g if ds is None else g + ds).to(s.dtype)
    return g * _mask(g, p, seed) if p else g, g if p else nothing(), dw, db


@_add_norm_backward.register_fake
def _(dy, ds, s, weight, eps, rms, p, seed, trains):
    n, kind = s.shape[-1], torch.promote_types(s.dtype, torch.float32)
    sums = (s.new_empty(n, dtype=kind), s.new_empty(n, dtype=kind)) if trains else (dy.new_empty(0), dy.new_empty(0))
    return s.new_empty(s.shape), s.new_empty(s.shape) if p else dy.new_empty(0), *sums


def _by_extension(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    rms: bool,
    p: float = 0.0,
    seed: int = 0,
) -> tuple[Tensor, Tensor]:
    n = x.shape[-1]
    flat = None if residual is None else residual.reshape(-1, n)
    y, s = cpp().add_norm(x.reshape(-1, n), flat, *_cut(n, weight, bias), eps, rms, p, seed)
    return y.view(x.shape), s.view(x.shape)


def _cut(n: int, *parameters: Tensor | None) -> list[Tensor | None]:
    return [None if t is None else t[:n] for t in parameters]


def _mask(x: Tensor, p: float, seed: Tensor | None) -> Tensor:
    """1 / (1 - p) where a number is kept, 0 where it is dropped."""
    assert seed is not None
    generator = torch.Generator(x.device).manual_seed(int(seed))
    return torch.rand(x.shape, generator=generator, device=x.device).ge(p).to(x.dtype) / (1 - p)


class _Carrying(torch.autograd.Function):
    """(norm(x), x): what comes back through the second is added in the same pass. An operator cannot hand x on: its
    outputs share no memory with its inputs."""

    @staticmethod
    def forward(ctx, x, weight, bias, eps, rms):
        ctx.set_materialize_grads(False)
        ctx.options = eps, rms, 0.0
        ctx.save_for_backward(x, weight, bias)
        return _add_norm(x, None, weight, bias, eps, rms, 0.0, None)[0], x.view_as(x)

    @staticmethod
    def backward(ctx, dy, ds):
        if dy is None:
            return ds, None, None, None, None
        x, *parameters = ctx.saved_tensors
        needs = ctx.needs_input_grad[1:3]
        dx, _, *sums = _add_norm_backward(dy, ds, x, parameters[0], *ctx.options, None, any(needs))
        return dx, *_whole(sums, parameters, needs), None, None


def _setup_context(ctx, inputs, output) -> None:
    x, residual, weight, bias, eps, rms, p, seed = inputs
    ctx.set_materialize_grads(False)
    ctx.options = eps, rms, p
    ctx.shapes = None if weight is None else weight.shape, None if bias is None else bias.shape
    ctx.adds = residual is not None
    ctx.save_for_backward(output[1] if residual is not None or p else x, weight, bias, seed)


def _backward(ctx, dy, ds):
    s, weight, bias, seed = ctx.saved_tensors
    needs = ctx.needs_input_grad
    trains = needs[2] or needs[3]
    if dy is None:
        dy = torch.zeros_like(s)
    if ds is not None and ds.shape != s.shape:
        ds = None  # of the empty s
    dx, d_residual, dw, db = _add_norm_backward(dy, ds, s, weight, *ctx.options, seed, trains)
    d_residual = (d_residual if ctx.options[2] else dx) if ctx.adds else None
    return dx, d_residual, *_whole([dw, db], [weight, bias], needs[2:4]), None, None, None, None


def _whole(sums: list[Tensor], parameters: list[Tensor | None], needs: Sequence[bool]) -> list[Tensor | None]:
    """Gradients of the parameters that need one: zero off the columns that were read."""
    found: list[Tensor | None] = []
    for some, parameter, wanted in zip(sums, parameters, needs, strict=True):
        whole = torch.zeros_like(parameter) if wanted and parameter is not None else None
        if whole is not None:
            whole[: some.shape[0]] = some
        found.append(whole)
    return found


_add_norm.register_autograd(_backward, setup_context=_setup_context)
