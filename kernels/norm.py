"""Normalisation over the leading n of the residual stream, with dropout and the residual's addition fused:

    s = residual + dropout(x),   y = norm(s)        (formulas: `mlfs.ops.norm`)

One program takes some rows whole. Nothing but s is kept for the backward pass: statistics and dropout mask (a counter
of row and column into Philox, Salmon et al. 2011, under a seed that is read from the device) are computed again.
"""

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from mlfs.kernels.arguments import optional, rows_or_none, stride_or_zero, with_rows

if TYPE_CHECKING:
    from mlfs.ops.layer import Dropout, Norm


@triton.jit
def _keep(seed, rows, columns, width, P: tl.constexpr):
    """1 / (1 - P) where a number is kept, 0 where it is dropped."""
    place = rows.to(tl.int64)[:, None] * width + columns[None, :]
    # four numbers of a Philox block would be cheaper to draw; one a number keeps the mask independent of the tiling
    low, high = (place & 0x7FFFFFFF).to(tl.int32), (place >> 31).to(tl.int32)
    bits, _, _, _ = tl.philox(seed, low, high, 0, 0)
    uniform = tl.uint_to_uniform_float(bits)
    return tl.where(uniform >= P, 1.0 / (1.0 - P), 0.0)


@triton.jit
def _statistics(s, mask, n, eps, RMS: tl.constexpr):
    """(s centred, 1 / its deviation) of rows in fp32."""
    if RMS:
        centred = s
    else:
        mean = tl.sum(s, axis=1) / n
        centred = tl.where(mask, s - mean[:, None], 0.0)
    return centred, 1.0 / tl.sqrt(tl.sum(centred * centred, axis=1) / n + eps)


@triton.jit
def _forward(
    x, residual, weight, bias, seed, y, s, rows, n, x_t, residual_t, eps,
    RMS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr, P: tl.constexpr,
    KEEP: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """y = norm(s) and, with KEEP, s = residual + dropout(x), of BLOCK_T rows."""
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    c = tl.arange(0, BLOCK_C)
    mask = (t < rows)[:, None] & (c < n)[None, :]
    t64 = t.to(tl.int64)[:, None]
    v = tl.load(x + t64 * x_t + c[None, :], mask=mask, other=0.0).to(tl.float32)
    if P > 0.0:
        v = v * _keep(tl.load(seed), t, c, n, P)
    if HAS_RESIDUAL:
        v += tl.load(residual + t64 * residual_t + c[None, :], mask=mask, other=0.0).to(tl.float32)
    v = v.to(s.dtype.element_ty)  # as the residual stream carries it on
    if KEEP:
        tl.store(s + t64 * n + c[None, :], v, mask=mask)
    v = v.to(tl.float32)
    centred, scale = _statistics(v, mask, n, eps, RMS)
    out = centred * scale[:, None]
    if RMS:
        out = out.to(s.dtype.element_ty).to(tl.float32)  # cast before it meets the weight, as the Llama family does
    if HAS_WEIGHT:
        out *= tl.load(weight + c, mask=c < n, other=0.0).to(tl.float32)[None, :]
    if HAS_BIAS:
        out += tl.load(bias + c, mask=c < n, other=0.0).to(tl.float32)[None, :]
    tl.store(y + t64 * n + c[None, :], out.to(y.dtype.element_ty), mask=mask)


@triton.jit
def _backward(
    dy, ds, s, weight, seed, dx, d_residual, dw, db, rows, n, dy_t, ds_t, eps,
    RMS: tl.constexpr, HAS_DS: tl.constexpr, HAS_WEIGHT: tl.constexpr, P: tl.constexpr, DROPS: tl.constexpr,
    TRAINS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr, LOOPS: tl.constexpr,
):  # fmt: skip
    """dx and d_residual (the same tensor where nothing is dropped); partial sums of dw and db, a row a program."""
    c = tl.arange(0, BLOCK_C)
    w = tl.full((BLOCK_C,), 1.0, tl.float32)
    if HAS_WEIGHT:
        w = tl.load(weight + c, mask=c < n, other=0.0).to(tl.float32)
    sum_w, sum_b = tl.zeros((BLOCK_C,), tl.float32), tl.zeros((BLOCK_C,), tl.float32)
    for i in range(LOOPS):
        t = (tl.program_id(0) * LOOPS + i) * BLOCK_T + tl.arange(0, BLOCK_T)
        mask = (t < rows)[:, None] & (c < n)[None, :]
        t64 = t.to(tl.int64)[:, None]
        v = tl.load(s + t64 * n + c[None, :], mask=mask, other=0.0).to(tl.float32)
        d = tl.load(dy + t64 * dy_t + c[None, :], mask=mask, other=0.0).to(tl.float32)
        centred, scale = _statistics(v, mask, n, eps, RMS)
        unit = centred * scale[:, None]
        if TRAINS:
            sum_w += tl.sum(d * unit, axis=0)
            sum_b += tl.sum(d, axis=0)
        d *= w[None, :]
        g = d - unit * (tl.sum(d * unit, axis=1) / n)[:, None]
        if not RMS:
            g -= (tl.sum(d, axis=1) / n)[:, None]
        g = g * scale[:, None]
        if HAS_DS:
            g += tl.load(ds + t64 * ds_t + c[None, :], mask=mask, other=0.0).to(tl.float32)
        if DROPS:
            tl.store(d_residual + t64 * n + c[None, :], g.to(d_residual.dtype.element_ty), mask=mask)
            g = g * _keep(tl.load(seed), t, c, n, P)
        tl.store(dx + t64 * n + c[None, :], g.to(dx.dtype.element_ty), mask=mask)
    if TRAINS:
        place = tl.program_id(0).to(tl.int64) * n + c
        tl.store(dw + place, sum_w, mask=c < n)
        tl.store(db + place, sum_b, mask=c < n)


# ---- launchers ------------------------------------------------------------------------------------------------------


def forward(
    x: Tensor,
    residual: Tensor | None,
    norm: "Norm",
    dropout: "Dropout | None" = None,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Normalises s = residual + dropout(x).

    Args:
        x, residual: (T, n); residual may be None.
        norm: its weight and bias are (N,), n ≤ N, contiguous, or None.
        dropout: its seed is one int64 on the device, needed if p > 0.

    Returns:
        y (T, n), of type `dtype` or s's; and s, which is x itself where nothing is added or dropped, else of the wider
        type of x and residual.
    """
    (rows, n), (weight, bias, eps, rms), (p, seed) = x.shape, norm, dropout or (0.0, None)
    keep = residual is not None or p > 0
    dtype_of_sum = x.dtype if residual is None else torch.result_type(x, residual)
    x, y = with_rows(x), x.new_empty((rows, n), dtype=dtype or dtype_of_sum)
    s = x.new_empty((rows, n), dtype=dtype_of_sum) if keep else x
    if x.numel():
        residual = rows_or_none(residual)
        block_t, block_c = _blocks(n)
        _forward[(triton.cdiv(rows, block_t),)](
            x, optional(residual, x), optional(weight, x), optional(bias, x), optional(seed, x), y, s,
            rows=rows, n=n, x_t=x.stride(0), residual_t=stride_or_zero(residual), eps=eps,
            RMS=rms, HAS_RESIDUAL=residual is not None, HAS_WEIGHT=weight is not None, HAS_BIAS=bias is not None,
            P=p, KEEP=keep, BLOCK_T=block_t, BLOCK_C=block_c, num_warps=_warps(block_c),
        )  # fmt: skip
    return y, s


def backward(
    dy: Tensor,
    ds: Tensor | None,
    s: Tensor,
    norm: "Norm",
    dropout: "Dropout | None" = None,
    trains: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Makes the gradients of `forward` from dy (T, n).

    Args:
        ds: what came back through the residual stream, if s goes on.
        s: what `forward` returned. norm, dropout: what it was given.

    Returns:
        dx and d_residual (T, n), the same tensor without dropout; and dw and db, (n,) in fp32 and summed in a fixed
        order, or None unless the norm `trains`.
    """
    (rows, n), (weight, _, eps, rms), (p, seed) = s.shape, norm, dropout or (0.0, None)
    dy, s = with_rows(dy), s.contiguous()
    ds = rows_or_none(ds)
    dx = torch.empty_like(s)
    d_residual = torch.empty_like(s) if p > 0 else dx
    block_t, block_c = _blocks(n)
    loops = max(1, triton.cdiv(rows, block_t * 256)) if trains else 1
    programs = triton.cdiv(rows, block_t * loops)
    sums = torch.empty((2, programs if trains else 0, n), dtype=torch.float32, device=s.device)
    if s.numel():
        _backward[(programs,)](
            dy, optional(ds, dy), s, optional(weight, s), optional(seed, s), dx, d_residual, sums[0], sums[1],
            rows=rows, n=n, dy_t=dy.stride(0), ds_t=stride_or_zero(ds), eps=eps,
            RMS=rms, HAS_DS=ds is not None, HAS_WEIGHT=weight is not None, P=p, DROPS=p > 0, TRAINS=trains,
            BLOCK_T=block_t, BLOCK_C=block_c, LOOPS=loops, num_warps=_warps(block_c),
        )  # fmt: skip
    dw, db = (sums[0].sum(0), sums[1].sum(0)) if trains else (None, None)
    return dx, d_residual, dw, db


def _blocks(n: int) -> tuple[int, int]:
    """(rows, columns) a program holds: some 4,096 numbers, or one row."""
    block_c = triton.next_power_of_2(max(n, 16))
    return max(1, min(16, 4096 // block_c)), block_c


def _warps(block_c: int) -> int:
    return 4 if block_c <= 4096 else 8 if block_c <= 16384 else 16
