"""Linear layer read through a slice, with low-rank stages:

    y = x · W[rows, :n]ᵀ + b[rows] + Σ_s c_s · (x · A_s[:, :n]ᵀ) · B_s[rows, :]ᵀ

Shapes: x (..., n), W (M, N) with any strides, b (M,), A_s (r_s, N), B_s (M, r_s), y (..., m); n ≤ N and m = Σ lengths.
`rows` are spans of W's rows, a flat list (start, length, start, length, ...): one span for a plain projection, one per
part for a fused one. W is read in place. It is frozen: the backward pass makes dx, and dA_s, dB_s for the stages that
ask for them, and no gradient of W or b.

Proposition 1 of "Efficiently Distilling LLMs for Edge Applications" (arXiv 2404.01353) is the identity behind it.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["sliced_linear", "sliced_linear_reference"]


def sliced_linear_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Sequence[Tensor],
    lora_b: Sequence[Tensor],
    scales: Sequence[float],
    spans: Sequence[int],
) -> Tensor:
    """The formula in plain, differentiable PyTorch (also in W and b: task heads train through it)."""
    n = x.shape[-1]
    parts = []
    for rows in _slices(spans):
        b = None if bias is None else bias[rows].to(x.dtype)
        parts.append(torch.nn.functional.linear(x, weight[rows, :n].to(x.dtype), b))
    y = parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)
    for a, b, c in zip(lora_a, lora_b, scales, strict=True):
        h = torch.nn.functional.linear(x, a[:, :n].to(x.dtype))
        y = y + torch.nn.functional.linear(h, _rows(b, spans).to(x.dtype)) * c
    return y


def sliced_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Sequence[Tensor],
    lora_b: Sequence[Tensor],
    scales: Sequence[float],
    spans: Sequence[int],
) -> Tensor:
    """The formula above, with W and b frozen.

    Args:
        x: (..., n), floating point. Under autocast it is cast to the autocast type; the result has its type.
        weight: (M, N), any strides, any floating type; never written, never copied when it has x's type.
        bias: (M,) or None.
        lora_a, lora_b, scales: per stage (r_s, N), (M, r_s) and a float; may be empty.
        spans: flat (start, length) pairs of rows.

    Returns:
        (..., m) of x's type.
    """
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    return _sliced_linear(x, weight, bias, list(lora_a), list(lora_b), list(scales), list(spans))


def _slices(spans: Sequence[int]) -> list[slice]:
    return [slice(start, start + length) for start, length in zip(spans[::2], spans[1::2], strict=True)]


def _rows(t: Tensor, spans: Sequence[int]) -> Tensor:
    rows = _slices(spans)
    return t[rows[0]] if len(rows) == 1 else torch.cat([t[r] for r in rows])


@torch.library.custom_op("mlfs::sliced_linear", mutates_args=())
def _sliced_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: list[Tensor],
    lora_b: list[Tensor],
    scales: list[float],
    spans: list[int],
) -> Tensor:
    n = x.shape[-1]
    y = x.new_empty(*x.shape[:-1], sum(spans[1::2]))
    flat, out = x.reshape(-1, n), y.view(-1, y.shape[-1])
    column = 0
    for rows in _slices(spans):
        part = out[:, column : column + rows.stop - rows.start]
        w = weight[rows, :n].to(x.dtype).t()
        if bias is None:
            torch.mm(flat, w, out=part) if part.is_contiguous() else part.copy_(flat @ w)
        else:
            b = bias[rows].to(x.dtype)
            torch.addmm(b, flat, w, out=part) if part.is_contiguous() else part.copy_(torch.addmm(b, flat, w))
        column += rows.stop - rows.start
    for a, b, c in zip(lora_a, lora_b, scales, strict=True):
        h = flat @ a[:, :n].to(x.dtype).t()
        out.addmm_(h, _rows(b, spans).to(x.dtype).t(), alpha=c)
    return y


@_sliced_linear.register_fake
def _(x, weight, bias, lora_a, lora_b, scales, spans):
    return x.new_empty(*x.shape[:-1], sum(spans[1::2]))


@torch.library.custom_op("mlfs::sliced_linear_backward", mutates_args=())
def _sliced_linear_backward(
    dy: Tensor,
    x: Tensor | None,
    weight: Tensor,
    lora_a: list[Tensor],
    lora_b: list[Tensor],
    scales: list[float],
    spans: list[int],
    trains: list[bool],
    needs_dx: bool,
    weight_columns: int,
) -> list[Tensor]:
    """[dx (empty unless needed), dA_s and dB_s of each stage s that trains]; the gradients are zero off the slice."""
    n, m = weight_columns, dy.shape[-1]
    grad = dy.reshape(-1, m)
    flat = x.reshape(-1, n) if x is not None else None
    dx = dy.new_empty((0, n))
    gradients = []
    if needs_dx:
        column, dx = 0, dy.new_empty((grad.shape[0], n))
        for i, rows in enumerate(_slices(spans)):
            part = grad[:, column : (column := column + rows.stop - rows.start)]
            torch.addmm(dx, part, weight[rows, :n].to(dy.dtype), beta=float(i > 0), out=dx)
    for a, b, c, train in zip(lora_a, lora_b, scales, trains, strict=True):
        if not (train or needs_dx):
            continue
        a_n = a[:, :n].to(dy.dtype)
        g = grad @ _rows(b, spans).to(dy.dtype)
        if needs_dx:
            dx.addmm_(g, a_n, alpha=c)
        if train:
            assert flat is not None
            da, db = torch.zeros_like(a), torch.zeros_like(b)
            da[:, :n] = (g.t() @ flat) * c
            db_rows, column = (grad.t() @ (flat @ a_n.t())) * c, 0
            for rows in _slices(spans):
                db[rows] = db_rows[column : (column := column + rows.stop - rows.start)]
            gradients += [da, db]
    return [dx.view(*dy.shape[:-1], n) if needs_dx else dx, *gradients]


@_sliced_linear_backward.register_fake
def _(dy, x, weight, lora_a, lora_b, scales, spans, trains, needs_dx, weight_columns):
    dx = dy.new_empty((*dy.shape[:-1], weight_columns) if needs_dx else (0, weight_columns))
    stages = [(a, b) for a, b, train in zip(lora_a, lora_b, trains, strict=True) if train]
    return [dx, *(torch.empty_like(t) for pair in stages for t in pair)]


def _setup_context(ctx, inputs, output) -> None:
    x, weight, _, lora_a, lora_b, scales, spans = inputs
    ctx.trains = [a.requires_grad or b.requires_grad for a, b in zip(lora_a, lora_b, strict=True)]
    ctx.scales, ctx.spans, ctx.stages = scales, spans, len(lora_a)
    ctx.columns = x.shape[-1]
    # x is only needed where an adapter trains: a frozen layer keeps nothing but its weights.
    ctx.save_for_backward(*([x] if any(ctx.trains) else []), weight, *lora_a, *lora_b)


def _backward(ctx, dy):
    saved = list(ctx.saved_tensors)
    x = saved.pop(0) if any(ctx.trains) else None
    weight, lora_a, lora_b = saved[0], saved[1 : 1 + ctx.stages], saved[1 + ctx.stages :]
    needs_dx = ctx.needs_input_grad[0]
    out = _sliced_linear_backward(
        dy, x, weight, lora_a, lora_b, ctx.scales, ctx.spans, ctx.trains, needs_dx, ctx.columns
    )
    gradients = iter(out[1:])
    da, db = [], []
    for train in ctx.trains:
        da.append(next(gradients) if train else None)
        db.append(next(gradients) if train else None)
    # An empty list of numbers looks like one of tensors to torch.library, which then wants a list back.
    return out[0] if needs_dx else None, None, None, da, db, None if ctx.scales else [], None


_sliced_linear.register_autograd(_backward, setup_context=_setup_context)
