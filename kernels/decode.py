"""The sliced product for a few tokens, as decoding makes it: bound by reading W once.

The depth is split over programs, so that even one token keeps every multiprocessor reading. Since the product is
linear, a program needs no h of others: over its own part of the depth it sums x · Wᵀ and, beside it, x · Aᵀ, whose
product with B it adds before it stores. One pass over W, and one small sum at the end, which adds bias and residual and
applies the activation.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from mlfs.kernels.configs import DEVICES, architecture, thin
from mlfs.kernels.epilogue import apply_activation
from mlfs.kernels.sliced_linear import (
    Stages,
    dot,
    in_launches,
    precision_of,
    six,
    span_of,
    stage_of,
    with_rows,
)

MAX_TOKENS = 16
BLOCK_C = 64


@triton.jit
def _parts(
    x, w, a0, a1, a2, b0, b1, b2, partial, tokens, depth, chunk, columns, x_t, w_k, w_c, a_q, b_c, c0, c1, c2,
    s0, l0, s1, l1, s2, l2,
    STAGES: tl.constexpr, RANK: tl.constexpr, SPANS: tl.constexpr, EVEN_K: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """partial[i, t, c]: x · Wᵀ + c_s (x · A_sᵀ) · B_sᵀ over the i-th part of the depth."""
    first, length, offset, tile = span_of(tl.program_id(0), s0, l0, s1, l1, s2, l2, SPANS, BLOCK_C)
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
    acc, low = tl.zeros((BLOCK_T, BLOCK_C), tl.float32), tl.zeros((BLOCK_T, BLOCK_R), tl.float32)
    if STAGES > 0:
        down = (stage_of(q, a0, a1, a2, RANK, STAGES) + (q % RANK) * a_q)[None, :] + k[:, None]
    end = tl.minimum(depth, (part + 1) * chunk)
    for start in range(part * chunk, end, BLOCK_K):
        inside = tl.arange(0, BLOCK_K) < end - start
        if EVEN_K:
            u = tl.load(xs, mask=in_rows[:, None], other=0.0)
            v = tl.load(ws, mask=in_columns[None, :], other=0.0)
        else:
            u = tl.load(xs, mask=in_rows[:, None] & inside[None, :], other=0.0)
            v = tl.load(ws, mask=inside[:, None] & in_columns[None, :], other=0.0)
        acc = dot(u, v, acc, PRECISION)
        if STAGES > 0:
            low = dot(u, tl.load(down, mask=inside[:, None] & in_ranks[None, :], other=0.0), low, PRECISION)
            down += BLOCK_K
        xs += BLOCK_K
        ws += step
    if STAGES > 0:
        low *= stage_of(q, c0, c1, c2, RANK, STAGES)
        up = (stage_of(q, b0, b1, b2, RANK, STAGES) + q % RANK)[:, None] + rows[None, :] * b_c
        b = tl.load(up, mask=in_ranks[:, None] & in_columns[None, :], other=0.0)
        acc = dot(low.to(x.dtype.element_ty), b, acc, PRECISION)
    out = (part.to(tl.int64) * tokens + t)[:, None] * columns + (offset + c)[None, :]
    tl.store(partial + out, acc, mask=in_rows[:, None] & in_columns[None, :])


@triton.jit
def _sum(
    partial, bias, operand, residual, y, parts, tokens, columns, operand_t, residual_t, y_t, s0, l0, s1, l1, s2, l2,
    SPANS: tl.constexpr, HAS_BIAS: tl.constexpr, ACTIVATION: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """y = act(Σ_i partial[i] + bias) + residual, the parts in order."""
    first, length, offset, tile = span_of(tl.program_id(0), s0, l0, s1, l1, s2, l2, SPANS, BLOCK_C)
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


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Sequence[Tensor],
    lora_b: Sequence[Tensor],
    scales: Sequence[float],
    spans: Sequence[int],
    activation: str = "none",
    operand: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """The formula of `mlfs.ops.sliced_linear` for x (T ≤ 16, n), without anything kept for a backward pass."""
    tokens, depth = x.shape
    stages = Stages.pack(lora_a, lora_b, scales)
    if stages.vector is not None:
        stages.a = [stages.a[0] * stages.vector[:, None]]
    x, bias = with_rows(x), None if bias is None else bias.contiguous()
    operand, residual = (None if t is None else with_rows(t) for t in (operand, residual))
    kind = x.dtype if residual is None else torch.result_type(x, residual)
    y, column = x.new_empty((tokens, sum(spans[1::2])), dtype=kind), 0
    if not y.numel():
        return y
    w, (block_k, pipeline) = weight.t(), thin(x.device, max(x.dtype.itemsize, weight.dtype.itemsize))
    for some in in_launches(spans):
        columns = sum(some[1::2])
        out = slice(column, column := column + columns)
        tiles = sum(triton.cdiv(length, BLOCK_C) for length in some[1::2])
        wanted = max(1, 2 * DEVICES[architecture(x.device)].processors // tiles)
        chunk = triton.cdiv(max(triton.cdiv(depth, wanted), 1), block_k) * block_k
        parts = max(1, triton.cdiv(depth, chunk))
        partial = torch.empty((parts, tokens, columns), dtype=torch.float32, device=x.device)
        a, b = stages.three(stages.a, x), stages.three(stages.b, x)
        _parts[(tiles, parts)](
            x, w, *a, *b, partial, tokens, depth, chunk, columns, x.stride(0), *w.stride(),
            a[0].stride(0), b[0].stride(0), *(stages.scales + [0.0] * 3)[:3], *six(some), STAGES=stages.count,
            RANK=max(stages.rank, 1), SPANS=len(some) // 2, EVEN_K=depth % block_k == 0, PRECISION=precision_of(x),
            BLOCK_T=MAX_TOKENS, BLOCK_C=BLOCK_C, BLOCK_K=block_k,
            BLOCK_R=max(16, triton.next_power_of_2(max(stages.width, 1))), num_warps=4, num_stages=pipeline,
        )  # fmt: skip
        goal = y[:, out]
        _sum[(tiles,)](
            partial, x if bias is None else bias, x if operand is None else operand[:, out],
            x if residual is None else residual[:, out], goal, parts, tokens, columns,
            0 if operand is None else operand.stride(0), 0 if residual is None else residual.stride(0), goal.stride(0),
            *six(some), SPANS=len(some) // 2,
            HAS_BIAS=bias is not None, ACTIVATION=activation, HAS_RESIDUAL=residual is not None, BLOCK_T=MAX_TOKENS,
            BLOCK_C=BLOCK_C, num_warps=4,
        )  # fmt: skip
    return y
