"""The sliced product for a few tokens, as decoding makes it: bound by reading W once.

The depth is split over programs, so that even one token keeps every multiprocessor reading. Since the product is
linear, a program needs no h of others: over its own part of the depth it sums x · Wᵀ and, beside it, x · Aᵀ, whose
product with B it adds before it stores. One pass over W, and one small sum at the end, which adds bias and residual and
applies the activation.
"""

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from mlfs.kernels.arguments import (
    Arguments,
    Stages,
    columns_or_none,
    epilogue_parts,
    in_launches,
    optional,
    precision_of,
    span_arguments,
    stride_or_zero,
    with_rows,
)
from mlfs.kernels.configs import DEVICES, architecture, thin
from mlfs.kernels.epilogue import apply_activation
from mlfs.kernels.tiles import dot, span_of, stage_of

if TYPE_CHECKING:
    from mlfs.ops.layer import Epilogue, LowRankLinear

MAX_TOKENS = 16  # the least that matrix units multiply at once
BLOCK_C = 64


@triton.jit
def _parts(
    x, w, a0, a1, a2, b0, b1, b2, partial, tokens, depth, chunk, columns, x_t, w_k, w_c, a_q, b_c,
    scale0, scale1, scale2, start0, length0, start1, length1, start2, length2,
    STAGES: tl.constexpr, RANK: tl.constexpr, SPANS: tl.constexpr, EVEN_K: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """partial[i, t, c]: x · Wᵀ + c_s (x · A_sᵀ) · B_sᵀ over the i-th part of the depth."""
    first, length, offset, tile = span_of(
        tl.program_id(0), start0, length0, start1, length1, start2, length2, SPANS, BLOCK_C
    )
    part = tl.program_id(1)
    t = tl.arange(0, BLOCK_T)
    c = tile * BLOCK_C + tl.arange(0, BLOCK_C)
    q = tl.arange(0, BLOCK_R)
    k = (part * chunk + tl.arange(0, BLOCK_K)).to(tl.int64)
    in_rows, in_columns, in_ranks = t < tokens, c < length, q < STAGES * RANK
    rows = (first + c).to(tl.int64)
    xs = x + t.to(tl.int64)[:, None] * x_t + k[None, :]
    ws = w + rows[None, :] * w_c + k[:, None] * w_k
    step = tl.full((), BLOCK_K, tl.int64) * w_k
    acc = tl.zeros((BLOCK_T, BLOCK_C), tl.float32)
    low = tl.zeros((BLOCK_T, BLOCK_R), tl.float32)  # x · A_sᵀ
    if STAGES > 0:
        down = (stage_of(q, a0, a1, a2, RANK, STAGES) + (q % RANK) * a_q)[None, :] + k[:, None]
    end = tl.minimum(depth, (part + 1) * chunk)
    for start in range(part * chunk, end, BLOCK_K):
        inside = tl.arange(0, BLOCK_K) < end - start
        if EVEN_K:
            a = tl.load(xs, mask=in_rows[:, None], other=0.0)
            b = tl.load(ws, mask=in_columns[None, :], other=0.0)
        else:
            a = tl.load(xs, mask=in_rows[:, None] & inside[None, :], other=0.0)
            b = tl.load(ws, mask=inside[:, None] & in_columns[None, :], other=0.0)
        acc = dot(a, b, acc, PRECISION)
        if STAGES > 0:
            low = dot(a, tl.load(down, mask=inside[:, None] & in_ranks[None, :], other=0.0), low, PRECISION)
            down += BLOCK_K
        xs += BLOCK_K
        ws += step
    if STAGES > 0:
        low *= stage_of(q, scale0, scale1, scale2, RANK, STAGES)
        up = (stage_of(q, b0, b1, b2, RANK, STAGES) + q % RANK)[:, None] + rows[None, :] * b_c
        b = tl.load(up, mask=in_ranks[:, None] & in_columns[None, :], other=0.0)
        acc = dot(low.to(x.dtype.element_ty), b, acc, PRECISION)
    out = (part.to(tl.int64) * tokens + t)[:, None] * columns + (offset + c)[None, :]
    tl.store(partial + out, acc, mask=in_rows[:, None] & in_columns[None, :])


@triton.jit
def _sum(
    partial, bias, operand, residual, y, parts, tokens, columns, operand_t, residual_t, y_t,
    start0, length0, start1, length1, start2, length2,
    SPANS: tl.constexpr, HAS_BIAS: tl.constexpr, ACTIVATION: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """y = act(Σ_i partial[i] + bias) + residual, the parts in order."""
    first, length, offset, tile = span_of(
        tl.program_id(0), start0, length0, start1, length1, start2, length2, SPANS, BLOCK_C
    )
    t = tl.arange(0, BLOCK_T)
    c = tile * BLOCK_C + tl.arange(0, BLOCK_C)
    mask = (t < tokens)[:, None] & (c < length)[None, :]
    column, t64 = offset + c, t.to(tl.int64)
    acc = tl.zeros((BLOCK_T, BLOCK_C), tl.float32)
    source = partial + t64[:, None] * columns + column[None, :]
    for _ in range(parts):
        acc += tl.load(source, mask=mask, other=0.0)
        source += tl.full((), 1, tl.int64) * tokens * columns
    if HAS_BIAS:
        acc += tl.load(bias + first + c, mask=c < length, other=0.0).to(tl.float32)[None, :]
    other = acc
    if ACTIVATION == "silu_mul":
        other = tl.load(operand + t64[:, None] * operand_t + column[None, :], mask=mask, other=0.0).to(tl.float32)
    acc = apply_activation(acc, other, ACTIVATION)
    if HAS_RESIDUAL:
        acc += tl.load(residual + t64[:, None] * residual_t + column[None, :], mask=mask, other=0.0).to(tl.float32)
    tl.store(y + t64[:, None] * y_t + column[None, :], acc.to(y.dtype.element_ty), mask=mask)


# ---- launchers ------------------------------------------------------------------------------------------------------


def forward(x: Tensor, layer: "LowRankLinear", epilogue: "Epilogue | None" = None) -> Tensor:
    """Applies a layer to x (T, n) of at most `MAX_TOKENS` tokens, and keeps nothing for a backward pass.

    Args:
        epilogue: what is done to the product; operand and residual are (T, m). None: nothing.

    Returns:
        y (T, m), of x's type or, with a residual, of the wider of theirs.
    """
    activation, operand, residual = epilogue_parts(epilogue)
    x, stages = with_rows(x), Stages.of(layer)
    if stages.rank_scales is not None:  # here no h is written that could be multiplied by them
        scaled = stages.a[0] * stages.rank_scales[:, None]
        stages = Stages([scaled], stages.b, [1.0])
    bias = None if layer.bias is None else layer.bias.contiguous()
    dtype = x.dtype if residual is None else torch.result_type(x, residual)
    y = x.new_empty((x.shape[0], layer.rows), dtype=dtype)
    if not y.numel():
        return y
    for spans, columns in in_launches(layer.spans):
        tiles, places = sum(triton.cdiv(length, BLOCK_C) for length in spans[1::2]), span_arguments(spans)
        partial = _launch_parts(x, layer.weight, stages, columns.stop - columns.start, tiles, places)
        own_operand, own_residual = columns_or_none(operand, columns), columns_or_none(residual, columns)
        _sum[(tiles,)](
            partial, optional(bias, x), optional(own_operand, x), optional(own_residual, x), y[:, columns],
            parts=partial.shape[0], tokens=x.shape[0], columns=partial.shape[2],
            operand_t=stride_or_zero(operand), residual_t=stride_or_zero(residual), y_t=y.stride(0),
            **places, HAS_BIAS=bias is not None, ACTIVATION=activation,
            HAS_RESIDUAL=residual is not None, BLOCK_T=MAX_TOKENS, BLOCK_C=BLOCK_C, num_warps=4,
        )  # fmt: skip
    return y


def _launch_parts(x: Tensor, weight: Tensor, stages: Stages, columns: int, tiles: int, places: Arguments) -> Tensor:
    """Returns (parts, T, columns): the product over some of the depth each, without epilogue.

    Args:
        tiles: that cover the columns, whose `places` in W are spans.
    """
    tokens, depth = x.shape
    block_k, pipeline = thin(x.device, max(x.dtype.itemsize, weight.dtype.itemsize))
    enough = max(1, 2 * DEVICES[architecture(x.device)].processors // tiles)
    chunk = triton.cdiv(max(triton.cdiv(depth, enough), 1), block_k) * block_k
    parts = max(1, triton.cdiv(depth, chunk))
    partial = torch.empty((parts, tokens, columns), dtype=torch.float32, device=x.device)
    _parts[(tiles, parts)](
        x, weight, **stages.pointers(stages.a, x, "a"), **stages.pointers(stages.b, x, "b"), partial=partial,
        tokens=tokens, depth=depth, chunk=chunk, columns=columns, x_t=x.stride(0),
        w_k=weight.stride(1), w_c=weight.stride(0),
        a_q=stages.a_q, b_c=stages.b_c,
        **stages.scale_arguments(), **places, STAGES=stages.count, RANK=max(stages.rank, 1),
        EVEN_K=depth % block_k == 0, PRECISION=precision_of(x), BLOCK_T=MAX_TOKENS, BLOCK_C=BLOCK_C, BLOCK_K=block_k,
        BLOCK_R=max(16, triton.next_power_of_2(stages.width)), num_warps=4, num_stages=pipeline,
    )  # fmt: skip
    return partial
