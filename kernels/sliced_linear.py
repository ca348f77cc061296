"""Sliced product with low-rank stages (formula: `mlfs.ops.sliced_linear`) for GPUs.

Forward, two launches: `_thin` makes h (tokens, R), the c_s · x A_sᵀ of all stages side by side; `_product` makes
[x | h] · [W | B]ᵀ: the adapters are one more step of the loop over W's columns, into the same accumulator, so the loop
itself is that of a plain product. Backward: `_product` with W, A and B read the other way gives dx, from g, the c_s ·
dz B_s side by side. `_thin_reduce` makes g and dB in one pass over dz, `_reduce` makes dA: sums over some tokens each,
which `_finish` adds up in a fixed order. W is only ever read.

Names: tokens T, depth K (what a product sums over), columns C (of its result). Spans of W's rows are the columns of the
forward product and the depth of the backward one.
"""

from collections.abc import Sequence
from itertools import accumulate as accumulate_sizes

import torch
import triton
import triton.language as tl
from torch import Tensor

from mlfs.kernels.configs import Config, architecture, choose, gradient_part, thin, unroll
from mlfs.kernels.epilogue import activation_backward_kernel, activation_gradient, apply_activation

MAX_SPANS = MAX_STAGES = 3  # in one launch; more spans take more launches, more stages are packed into one


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """acc + a · b, with b cast to a's type. "interpreted": in fp32, as Triton's interpreter cannot multiply bf16."""
    b = b.to(a.dtype)
    if PRECISION == "interpreted":
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def span_of(tile, s0, l0, s1, l1, s2, l2, SPANS: tl.constexpr, BLOCK: tl.constexpr):
    """Of the span that column tile `tile` is in: (first row of W, length, first column of the result, tile within)."""
    start, length, column = s0, l0, tile * 0
    if SPANS > 1:
        tiles = tl.cdiv(l0, BLOCK)
        beyond = tile >= tiles
        tile = tl.where(beyond, tile - tiles, tile)
        start, length, column = tl.where(beyond, s1, start), tl.where(beyond, l1, length), tl.where(beyond, l0, column)
        if SPANS > 2:
            tiles = tl.where(beyond, tl.cdiv(l1, BLOCK), 0x7FFFFFFF)
            beyond = tile >= tiles
            tile = tl.where(beyond, tile - tiles, tile)
            start, length = tl.where(beyond, s2, start), tl.where(beyond, l2, length)
            column = tl.where(beyond, l0 + l1, column)
    return start, length, column, tile


@triton.jit
def nth(i, v0, v1, v2, COUNT: tl.constexpr):
    """The i-th of v0, v1, v2 (pointers or numbers), of which there are COUNT."""
    v = v0
    if COUNT > 1:
        v = tl.where(i == 1, v1, v0)
    if COUNT > 2:
        v = tl.where(i == 2, v2, v)
    return v


@triton.jit
def stage_of(q, v0, v1, v2, RANK: tl.constexpr, STAGES: tl.constexpr):
    """The one of v0, v1, v2 (pointers or numbers) that belongs to rank index q of all stages side by side."""
    return nth(q // RANK, v0, v1, v2, STAGES)


@triton.jit
def readable(i, end, CLAMP: tl.constexpr):
    """(Indices to read, mask) of those before `end`. CLAMP: beyond it the last one is read again, nothing is masked."""
    mask = i < end
    if CLAMP:
        i, mask = tl.minimum(i, end - 1), tl.full(i.shape, True, tl.int1)
    return i, mask


@triton.jit
def accumulate(
    acc, x, w, depth, w_k, mask, UNIT_K: tl.constexpr, BLOCK_K: tl.constexpr, EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """acc + x · w over `depth`, from tiles of pointers x (T, K) and w (K, C), masked along C; UNIT_K: w_k is 1.

    What a step costs beside the product is addresses and masks. So rows of x are clamped, not masked, and pointers stay
    where they are if an offset will do: 73 instructions a step instead of 123 (sm90, forward, 128 × 128 × 64). W is
    loaded first: the other way round, some loops get 6 more (sm90, backward, grouped).
    """
    k = tl.arange(0, BLOCK_K)
    step = tl.full((), BLOCK_K, tl.int64) * w_k
    for start in range(0, depth, BLOCK_K):
        if UNIT_K:
            ws = w + start
        else:
            ws = w
            w += step
        if EVEN_K:
            b = tl.load(ws, mask=mask[None, :], other=0.0)
            a = tl.load(x + start)
        else:
            inside = k < depth - start
            b = tl.load(ws, mask=inside[:, None] & mask[None, :], other=0.0)
            a = tl.load(x + start, mask=inside[None, :], other=0.0)
        acc = dot(a, b, acc, PRECISION)
    return acc


@triton.jit
def tile_of(tokens, BLOCK_T: tl.constexpr, GROUP: tl.constexpr):
    """(Tile of tokens, tile of columns) of this program. Neighbours share W's tiles: GROUP tiles of tokens go over the
    columns together."""
    tiles_t = tl.cdiv(tokens, BLOCK_T)
    tiles_c = tl.num_programs(0) // tiles_t
    program = tl.program_id(0)
    group = program // (GROUP * tiles_c)
    size = tl.minimum(tiles_t - group * GROUP, GROUP)
    return group * GROUP + program % (GROUP * tiles_c) % size, program % (GROUP * tiles_c) // size


@triton.jit
def add_stages(
    acc, h, p0, p1, p2, t, in_rows, rows, in_columns, h_t, p_q, p_c,
    STAGES: tl.constexpr, RANK: tl.constexpr, BLOCK_R: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """acc + h · Q, Q the stages read through p_q, p_c: the last steps of a product's loop over [.. | h] · [.. | Q]."""
    for r in tl.static_range(0, STAGES * RANK, BLOCK_R):
        q = r + tl.arange(0, BLOCK_R)
        in_ranks = q < STAGES * RANK
        hs = h + t.to(tl.int64)[:, None] * h_t + q[None, :]
        ps = (stage_of(q, p0, p1, p2, RANK, STAGES) + (q % RANK) * p_q)[:, None] + rows[None, :] * p_c
        a = tl.load(hs, mask=in_rows[:, None] & in_ranks[None, :], other=0.0)
        b = tl.load(ps, mask=in_ranks[:, None] & in_columns[None, :], other=0.0)
        acc = dot(a, b, acc, PRECISION)
    return acc


@triton.jit
def _thin(
    x, p0, p1, p2, h, tokens, depth, x_t, h_t, p_q, p_k, c0, c1, c2, s0, l0, s1, l1, s2, l2,
    STAGES: tl.constexpr, RANK: tl.constexpr, SPANS: tl.constexpr, EVEN_K: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """h[t, q] = c_s · Σ_k x[t, k] · P_s[k, r] with q = s · RANK + r; k runs over `depth`, or over spans of P's rows."""
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    q = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    k = tl.arange(0, BLOCK_K).to(tl.int64)
    in_rows, in_ranks = t < tokens, q < STAGES * RANK
    xs = x + tl.minimum(t, tokens - 1).to(tl.int64)[:, None] * x_t + k[None, :]
    read, mask = readable(q, STAGES * RANK, SPANS == 0)
    ps = stage_of(read, p0, p1, p2, RANK, STAGES) + (read % RANK) * p_q
    acc = tl.zeros((BLOCK_T, BLOCK_R), tl.float32)
    if SPANS == 0:
        ks = ps[None, :] + k[:, None] * p_k
        acc = accumulate(acc, xs, ks, depth, p_k, mask, SPANS == 0, BLOCK_K, EVEN_K, PRECISION)
    else:
        ks = ps[None, :] + (k + s0)[:, None] * p_k
        acc = accumulate(acc, xs, ks, l0, p_k, mask, SPANS == 0, BLOCK_K, EVEN_K, PRECISION)
    if SPANS > 1:
        ks = ps[None, :] + (k + s1)[:, None] * p_k
        acc = accumulate(acc, xs + l0, ks, l1, p_k, mask, SPANS == 0, BLOCK_K, EVEN_K, PRECISION)
    if SPANS > 2:
        ks = ps[None, :] + (k + s2)[:, None] * p_k
        acc = accumulate(acc, xs + l0 + l1, ks, l2, p_k, mask, SPANS == 0, BLOCK_K, EVEN_K, PRECISION)
    acc *= stage_of(q, c0, c1, c2, RANK, STAGES)
    out = h + t.to(tl.int64)[:, None] * h_t + q[None, :]
    tl.store(out, acc.to(h.dtype.element_ty), mask=in_rows[:, None] & in_ranks[None, :])


@triton.jit
def store_gradient(
    acc, g, pre, operand, y, d_operand, partial, tile_t, t, in_rows, first, end, g_t, y_t, operand_t, first_rank,
    ACTIVATION: tl.constexpr, RANKS: tl.constexpr, PRECISION: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr, PART: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """From acc, the gradient of x = act(pre) [· operand] in BLOCK_C columns: that of pre to y, that of operand to
    d_operand; and partial[tile_t, q, c] = Σ_t g[t, first_rank + q] · x[t, c] for RANKS ranks q, with x made again."""
    if BLOCK_C > PART:  # with all that it meets, the tile does not fit into registers
        left, right = tl.split(tl.permute(tl.reshape(acc, (BLOCK_T, 2, BLOCK_C // 2)), (0, 2, 1)))
        store_gradient(
            left, g, pre, operand, y, d_operand, partial, tile_t, t, in_rows, first, end, g_t, y_t, operand_t,
            first_rank, ACTIVATION, RANKS, PRECISION, BLOCK_T, BLOCK_C // 2, PART, BLOCK_R,
        )  # fmt: skip
        store_gradient(
            right, g, pre, operand, y, d_operand, partial, tile_t, t, in_rows, first + BLOCK_C // 2, end, g_t, y_t,
            operand_t, first_rank, ACTIVATION, RANKS, PRECISION, BLOCK_T, BLOCK_C // 2, PART, BLOCK_R,
        )  # fmt: skip
    else:
        t64, c = t.to(tl.int64), first + tl.arange(0, BLOCK_C)
        mask, out = in_rows[:, None] & (c < end)[None, :], t64[:, None] * y_t + c[None, :]
        z = tl.load(pre + out, mask=mask, other=0.0).to(tl.float32)
        other = z
        if ACTIVATION == "silu_mul":
            other = tl.load(operand + t64[:, None] * operand_t + c[None, :], mask=mask, other=0.0).to(tl.float32)
        acc, gate = activation_gradient(acc, z, other, ACTIVATION)
        tl.store(y + out, acc.to(y.dtype.element_ty), mask=mask)
        if ACTIVATION == "silu_mul":
            tl.store(d_operand + out, gate.to(d_operand.dtype.element_ty), mask=mask)
        x = apply_activation(z, other, ACTIVATION).to(pre.dtype.element_ty)
        for r in tl.static_range(0, RANKS, BLOCK_R):
            q = r + tl.arange(0, BLOCK_R)
            in_ranks = (q < RANKS)[:, None]
            gs = tl.load(
                g + t64[None, :] * g_t + (first_rank + q)[:, None], mask=in_ranks & in_rows[None, :], other=0.0
            )
            sums = dot(gs, x, tl.zeros((BLOCK_R, BLOCK_C), tl.float32), PRECISION)
            place = partial + (tile_t.to(tl.int64) * RANKS + q)[:, None] * end + c[None, :]
            tl.store(place, sums, mask=in_ranks & (c < end)[None, :])


@triton.jit
def _product(
    x, w, bias, h, p0, p1, p2, operand, residual, y, pre, d_operand, partial, tokens, depth, columns, x_t, h_t,
    w_k, w_c, p_q, p_c, operand_t, residual_t, y_t, first_rank, s0, l0, s1, l1, s2, l2,
    STAGES: tl.constexpr, RANK: tl.constexpr, SPANS: tl.constexpr, SPANS_K: tl.constexpr, UNROLL: tl.constexpr,
    UNIT_K: tl.constexpr, EVEN_K: tl.constexpr, HAS_BIAS: tl.constexpr, ACTIVATION: tl.constexpr,
    KEEP_PRE: tl.constexpr, GRADIENT: tl.constexpr, PART: tl.constexpr, RANKS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr, PRECISION: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """One BLOCK_T × BLOCK_C tile of y = act(x · P + h · Q + bias) + residual; P and Q are W and the stages, read
    through strides w_k, w_c and p_q, p_c. GRADIENT: the sum is the gradient of act(pre) instead, and y that of pre; see
    `store_gradient`."""
    tile_t, tile_c = tile_of(tokens, BLOCK_T, GROUP)
    t = tile_t * BLOCK_T + tl.arange(0, BLOCK_T)
    k = tl.arange(0, BLOCK_K).to(tl.int64)
    in_rows = t < tokens
    if SPANS_K:
        first, length, offset, tile = tile_c * 0, columns, tile_c * 0, tile_c
    else:
        first, length, offset, tile = span_of(tile_c, s0, l0, s1, l1, s2, l2, SPANS, BLOCK_C)
    c = tile * BLOCK_C + tl.arange(0, BLOCK_C)  # within the span
    in_columns = c < length
    rows = (first + c).to(tl.int64)  # of W in the forward product, columns of it in the backward one
    xs = x + tl.minimum(t, tokens - 1).to(tl.int64)[:, None] * x_t + k[None, :]
    read, mask = readable(c, length, UNIT_K)
    ws = w + (first + read).to(tl.int64)[None, :] * w_c
    acc = tl.zeros((BLOCK_T, BLOCK_C), tl.float32)
    if SPANS_K:
        for i in tl.range(SPANS, loop_unroll_factor=UNROLL):
            ks = ws + (k + nth(i, s0, s1, s2, SPANS))[:, None] * w_k
            part = nth(i, l0, l1, l2, SPANS)
            acc = accumulate(acc, xs, ks, part, w_k, mask, UNIT_K, BLOCK_K, EVEN_K, PRECISION)
            xs += part
    else:
        ks = ws + k[:, None] * w_k
        acc = accumulate(acc, xs, ks, depth, w_k, mask, UNIT_K, BLOCK_K, EVEN_K, PRECISION)
    t64, column, mask = t.to(tl.int64)[:, None], (offset + c)[None, :], in_rows[:, None] & in_columns[None, :]
    if HAS_RESIDUAL:  # while the stages are multiplied; later, a tile of 64 × 64 spills on sm100
        more = tl.load(residual + t64 * residual_t + column, mask=mask, other=0.0)
    acc = add_stages(acc, h, p0, p1, p2, t, in_rows, rows, in_columns, h_t, p_q, p_c, STAGES, RANK, BLOCK_R, PRECISION)

    if GRADIENT:
        store_gradient(
            acc, h, pre, operand, y, d_operand, partial, tile_t, t, in_rows, tile * BLOCK_C, length, h_t, y_t,
            operand_t, first_rank, ACTIVATION, RANKS, PRECISION, BLOCK_T, BLOCK_C, PART, BLOCK_R,
        )  # fmt: skip
    else:
        out = t64 * y_t + column
        if HAS_BIAS:
            acc += tl.load(bias + rows, mask=in_columns, other=0.0).to(tl.float32)[None, :]
        if KEEP_PRE:
            tl.store(pre + out, acc.to(pre.dtype.element_ty), mask=mask)
        other = acc
        if ACTIVATION == "silu_mul":
            other = tl.load(operand + t64 * operand_t + column, mask=mask, other=0.0).to(tl.float32)
        acc = apply_activation(acc, other, ACTIVATION)
        if HAS_RESIDUAL:
            acc += more.to(tl.float32)
        tl.store(y + out, acc.to(y.dtype.element_ty), mask=mask)


@triton.jit
def _reduce(
    g, x, partial, tokens, ranks, columns, chunk, g_t, x_t,
    PRECISION: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """partial[i, q, c] = Σ_t g[t, q] · x[t, c] over the i-th chunk of tokens."""
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    part = tl.program_id(1)
    q = tl.program_id(2) * BLOCK_R + tl.arange(0, BLOCK_R)
    t = part.to(tl.int64) * chunk + tl.arange(0, BLOCK_T)
    end = tl.minimum(tokens, (part + 1) * chunk)
    in_columns, in_ranks = c < columns, q < ranks
    gs = g + t[None, :] * g_t + q[:, None]
    xs = x + t[:, None] * x_t + c[None, :]
    acc = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    for start in range(part * chunk, end, BLOCK_T):
        inside = tl.arange(0, BLOCK_T) < end - start
        a = tl.load(gs, mask=in_ranks[:, None] & inside[None, :], other=0.0)
        b = tl.load(xs, mask=inside[:, None] & in_columns[None, :], other=0.0)
        acc = dot(a, b, acc, PRECISION)
        gs += tl.full((), BLOCK_T, tl.int64) * g_t
        xs += tl.full((), BLOCK_T, tl.int64) * x_t
    out = (part.to(tl.int64) * ranks + q)[:, None] * columns + c[None, :]
    tl.store(partial + out, acc, mask=in_ranks[:, None] & in_columns[None, :])


@triton.jit
def _thin_reduce(
    dz, h, p0, p1, p2, partial_g, partial, tokens, columns, ranks, tiles, per_split, dz_t, h_t, p_k, c0, c1, c2,
    s0, l0, s1, l1, s2, l2,
    STAGES: tl.constexpr, RANK: tl.constexpr, SPANS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """`_thin` of dz over some column tiles and `_reduce` of it over some tokens, from one pass over dz:

    partial_g[j, q, t] = c_s · Σ_c dz[t, c] · P_s[row(c), r]    over the j-th of the column tiles' splits
    partial[i, q, c]   = Σ_t h[t, q] · dz[t, c]                 over the i-th BLOCK_T tokens
    """
    part, split = tl.program_id(0), tl.program_id(1)
    t = part * BLOCK_T + tl.arange(0, BLOCK_T)
    q = tl.arange(0, BLOCK_R)
    in_rows, in_stages, in_ranks = t < tokens, q < STAGES * RANK, q < ranks
    t64 = t.to(tl.int64)
    hs = tl.load(h + t64[None, :] * h_t + q[:, None], mask=in_ranks[:, None] & in_rows[None, :], other=0.0)
    ps = (stage_of(q, p0, p1, p2, RANK, STAGES) + q % RANK)[None, :]
    acc = tl.zeros((BLOCK_T, BLOCK_R), tl.float32)
    for tile in range(split * per_split, tl.minimum(tiles, (split + 1) * per_split)):
        start, length, offset, within = span_of(tile, s0, l0, s1, l1, s2, l2, SPANS, BLOCK_C)
        c = within * BLOCK_C + tl.arange(0, BLOCK_C)
        in_columns, column = c < length, offset + c
        d = tl.load(dz + t64[:, None] * dz_t + column[None, :], mask=in_rows[:, None] & in_columns[None, :], other=0.0)
        p = tl.load(
            ps + (start + c).to(tl.int64)[:, None] * p_k, mask=in_columns[:, None] & in_stages[None, :], other=0.0
        )
        acc = dot(d, p, acc, PRECISION)
        sums = dot(hs, d, tl.zeros((BLOCK_R, BLOCK_C), tl.float32), PRECISION)
        out = (part.to(tl.int64) * ranks + q)[:, None] * columns + column[None, :]
        tl.store(partial + out, sums, mask=in_ranks[:, None] & in_columns[None, :])
    acc *= stage_of(q, c0, c1, c2, RANK, STAGES)
    out = (split.to(tl.int64) * STAGES * RANK + q)[None, :] * tokens + t64[:, None]
    tl.store(partial_g + out, acc, mask=in_rows[:, None] & in_stages[None, :])


@triton.jit
def _finish(
    partial, out, parts, first, rank, ranks, columns, out_q, out_c, s0, l0, s1, l1, s2, l2, SPANS: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """out[r, row(c)] = Σ_i partial[i, first + r, c], i in order: the same sum on every run."""
    start, length, offset, tile = span_of(tl.program_id(0), s0, l0, s1, l1, s2, l2, SPANS, BLOCK_C)
    c = tile * BLOCK_C + tl.arange(0, BLOCK_C)
    r = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    mask = (r < rank)[:, None] & (c < length)[None, :]
    source = partial + (first + r).to(tl.int64)[:, None] * columns + (offset + c)[None, :]
    acc = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    for _ in range(parts):
        acc += tl.load(source, mask=mask, other=0.0)
        source += tl.full((), 1, tl.int64) * ranks * columns
    goal = out + r.to(tl.int64)[:, None] * out_q + (start + c).to(tl.int64)[None, :] * out_c
    tl.store(goal, acc.to(out.dtype.element_ty), mask=mask)


# ---- launchers ------------------------------------------------------------------------------------------------------


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
    keep_pre: bool = False,
    config: Config | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The formula of `mlfs.ops.sliced_linear` on 2-d tensors: (y (T, m), h (T, R), z (T, m) before the activation).

    z is of size 0 unless `keep_pre`. operand, residual: (T, m). config: tiles of the product; chosen if None.
    """
    tokens, depth = x.shape
    m = sum(spans[1::2])
    stages = Stages.pack(lora_a, lora_b, scales)
    x, operand, residual = with_rows(x), _with_rows_or_none(operand), _with_rows_or_none(residual)
    bias = None if bias is None else bias.contiguous()
    y = x.new_empty((tokens, m), dtype=x.dtype if residual is None else torch.result_type(x, residual))
    pre = x.new_empty((tokens, m) if keep_pre else 0)
    h = x.new_empty((tokens, stages.width))
    if y.numel() == 0:
        return y, h, pre
    launch_thin(x, stages.a, h, depth, stages, [0, depth], reads_spans=False)
    column = 0
    for some in in_launches(spans):
        out = slice(column, column := column + sum(some[1::2]))
        launch_product(
            x, weight.t(), bias, h, stages.b, stages, some, False, depth, y[:, out], config, activation,
            None if operand is None else operand[:, out], None if residual is None else residual[:, out],
            pre[:, out] if keep_pre else None,
        )  # fmt: skip
    return y, h, pre


def backward(
    dz: Tensor,
    x: Tensor | None,
    h: Tensor | None,
    weight: Tensor,
    lora_a: Sequence[Tensor],
    lora_b: Sequence[Tensor],
    scales: Sequence[float],
    spans: Sequence[int],
    trains: Sequence[bool],
    needs_dx: bool,
    columns: int,
    config: Config | None = None,
    residual: Tensor | None = None,
    activation: str = "none",
    pre: Tensor | None = None,
    operand: Tensor | None = None,
) -> list[Tensor]:
    """[dx (T, n), or (0, n) unless needed; dA_s, dB_s of each stage that trains] from dz (T, m) and h of `forward`.

    residual: (T, n), added to dx; not with an activation.
    activation: what x = act(pre) [· operand] was made by, both (T, n). Then the list starts with the gradients of pre
    and of operand, if there is one, instead of dx; without x, it is made again for dA, beside dx, which is needed then.
    """
    tokens, n = dz.shape[0], columns
    dz = with_rows(dz)
    stages = Stages.pack(lora_a, lora_b, scales)
    dx = dz.new_empty((tokens if needs_dx else 0, n))
    gradients = [torch.zeros_like(t) for s, train in enumerate(trains) if train for t in (lora_a[s], lora_b[s])]
    before = [dx] if operand is None else [dx, torch.empty_like(dx)]
    if dz.numel() == 0 or n == 0:
        dx.zero_() if residual is None else dx.copy_(residual)
        return [dx, *(t.zero_() for t in before[1:]), *gradients]
    g = dz.new_empty((tokens, stages.width))
    parts = in_launches(spans)
    read = parts[0]
    if len(parts) > 1:  # so many spans do not fit one launch: read them as one matrix
        rows = torch.cat([torch.arange(a, a + k, device=dz.device) for a, k in pairs_of(spans)])
        weight, read = weight[:, :n].index_select(0, rows), [0, dz.shape[1]]
        stages = stages.read_rows(rows)
    again = None  # the ranks whose dA comes from the product, which makes x again

    def finish_a(partial: Tensor) -> None:
        for goal, place in zip(gradients[::2], places, strict=True):
            launch_finish(partial, goal, place, goal.shape[0], [0, n], transposed=False)

    if any(trains):
        assert h is not None
        ranks, starts = trained_ranks(lora_a, trains)
        places = [start for start, train in zip(starts, trains, strict=True) if train]
        partial = launch_back(dz, h[:, ranks], g, stages, read)
        for goal, place in zip(gradients[1::2], places, strict=True):
            column = 0
            for some in parts:
                width = sum(some[1::2])
                own = partial[:, :, column : column + width]
                launch_finish(own, goal, place, goal.shape[1], some, transposed=True)
                column += width
        if x is None:
            again = ranks
        else:
            finish_a(launch_reduce(g[:, ranks], with_rows(x)))
    elif needs_dx:
        launch_thin(dz, stages.b, g, dz.shape[1], stages, read, reads_spans=True)
    if needs_dx:
        partial = launch_product(
            dz, weight, None, g, stages.a, stages, read, True, n, dx, config, activation, _with_rows_or_none(operand),
            _with_rows_or_none(residual), None if pre is None else pre.contiguous(), before[-1], gradient=True,
            reduces=again,
        )  # fmt: skip
        if again:
            finish_a(partial)
    return [*before, *gradients]


def activation_backward(
    dy: Tensor, pre: Tensor, operand: Tensor | None, activation: str
) -> tuple[Tensor, Tensor | None]:
    """(dz, d_operand) of y = act(z) [· operand], all (T, m)."""
    dy, pre, operand = with_rows(dy), with_rows(pre), _with_rows_or_none(operand)
    dz = torch.empty_like(dy, memory_format=torch.contiguous_format)
    d_operand = None if operand is None else torch.empty_like(dz)
    if dy.numel():
        activation_backward_kernel[(dy.shape[0],)](
            dy, pre, pre if operand is None else operand, dz, dz if d_operand is None else d_operand, *dy.shape,
            dy.stride(0), pre.stride(0), 0 if operand is None else operand.stride(0),
            ACTIVATION=activation, BLOCK=min(2048, triton.next_power_of_2(dy.shape[1])),
        )  # fmt: skip
    return dz, d_operand


class Stages:
    """The low-rank stages as the kernels read them: at most three, of one rank, rows contiguous."""

    def __init__(self, a: list[Tensor], b: list[Tensor], scales: list[float]) -> None:
        self.a, self.b, self.scales = a, b, scales
        self.count, self.rank = len(a), a[0].shape[0] if a else 0
        self.width = self.count * self.rank
        self.vector: Tensor | None = None  # the scale of each rank index, where they were packed
        self.block_r = min(64, max(16, triton.next_power_of_2(max(self.width, 1))))

    @classmethod
    def pack(cls, a: Sequence[Tensor], b: Sequence[Tensor], scales: Sequence[float]) -> "Stages":
        if len(a) > MAX_STAGES or len({t.shape[0] for t in a}) > 1:
            packed = cls([torch.cat(list(a))], [torch.cat(list(b), dim=1)] if b else [], [1.0])
            packed.vector = torch.cat([t.new_full((t.shape[0],), c) for t, c in zip(a, scales, strict=True)])
            return packed
        return cls([t.contiguous() for t in a], [t.contiguous() for t in b], list(scales))

    def read_rows(self, rows: Tensor) -> "Stages":
        read = Stages(self.a, [t.index_select(0, rows) for t in self.b], self.scales)
        read.vector = self.vector
        return read

    def three(self, tensors: list[Tensor], otherwise: Tensor) -> list[Tensor]:
        return (tensors + [tensors[0] if tensors else otherwise] * 3)[:3]


def launch_thin(
    x: Tensor, p: list[Tensor], h: Tensor, depth: int, stages: Stages, spans: Sequence[int], reads_spans: bool
) -> None:
    if not stages.width:
        return
    tokens = x.shape[0]
    p_q, p_k = (1, p[0].stride(0)) if reads_spans else (p[0].stride(0), 1)
    block_t = 16 if tokens <= 2048 else 32 if tokens <= 8192 else 64
    block_k, pipeline = thin(x.device, max(x.dtype.itemsize, p[0].dtype.itemsize))
    used = spans[1::2] if reads_spans else [depth]
    _thin[(triton.cdiv(tokens, block_t), triton.cdiv(stages.width, stages.block_r))](
        x, *stages.three(p, x), h, tokens, depth, x.stride(0), h.stride(0), p_q, p_k,
        *(stages.scales + [0.0] * 3)[:3], *six(spans),
        STAGES=stages.count, RANK=stages.rank, SPANS=len(used) if reads_spans else 0,
        EVEN_K=all(length % block_k == 0 for length in used), PRECISION=precision_of(x),
        BLOCK_T=block_t, BLOCK_K=block_k, BLOCK_R=stages.block_r, num_warps=4, num_stages=pipeline,
    )  # fmt: skip
    if stages.vector is not None:
        h.mul_(stages.vector)


def launch_product(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    h: Tensor,
    p: list[Tensor],
    stages: Stages,
    spans: Sequence[int],
    reads_spans: bool,
    size: int,
    y: Tensor,
    config: Config | None = None,
    activation: str = "none",
    operand: Tensor | None = None,
    residual: Tensor | None = None,
    pre: Tensor | None = None,
    d_operand: Tensor | None = None,
    gradient: bool = False,
    reduces: slice | None = None,
) -> Tensor:
    """w: (K, C) as the product reads it. size: the depth, or with `reads_spans` the columns.

    gradient: through the activation, back to `pre`, which is then read and not written, and to d_operand. Then
    (parts, R', columns) is returned: h[:, reduces] (T, R')ᵀ · act(pre) [· operand] over some tokens each.
    """
    tokens = x.shape[0]
    lengths = spans[1::2]
    columns = size if reads_spans else sum(lengths)
    depths = lengths if reads_spans else [size]
    p_q, p_c = (0, 0) if not p else (p[0].stride(0), 1) if reads_spans else (1, p[0].stride(0))

    ranks, gradient = 0 if reduces is None else reduces.stop - reduces.start, gradient and activation != "none"
    partial = y

    def run(config: Config) -> None:
        nonlocal partial
        if ranks:
            parts = triton.cdiv(tokens, config.block_t)
            partial = torch.empty((parts, ranks, columns), dtype=torch.float32, device=x.device)
        tiles_c = sum(triton.cdiv(length, config.block_c) for length in ([columns] if reads_spans else lengths))
        _product[(triton.cdiv(tokens, config.block_t) * tiles_c,)](
            x, w, _or(bias, x), h if stages.width else x, *stages.three(p, x), _or(operand, x), _or(residual, x), y,
            _or(pre, y), _or(d_operand, y), partial, tokens, sum(depths), columns, x.stride(0), h.stride(0),
            *w.stride(), p_q, p_c, 0 if operand is None else operand.stride(0),
            0 if residual is None else residual.stride(0), y.stride(0), reduces.start if reduces else 0, *six(spans),
            STAGES=stages.count, RANK=max(stages.rank, 1), SPANS=len(lengths), SPANS_K=reads_spans,
            UNROLL=unroll(x.device, len(depths)), UNIT_K=w.stride(0) == 1,
            EVEN_K=all(length % config.block_k == 0 for length in depths), HAS_BIAS=bias is not None,
            ACTIVATION=activation, KEEP_PRE=pre is not None and not gradient, GRADIENT=gradient,
            PART=gradient_part(x.device), RANKS=ranks, HAS_RESIDUAL=residual is not None,
            PRECISION=precision_of(x), BLOCK_T=config.block_t, BLOCK_C=config.block_c, BLOCK_K=config.block_k,
            BLOCK_R=stages.block_r, GROUP=config.group, num_warps=config.warps, num_stages=config.stages,
        )  # fmt: skip

    if config is None:
        shape, kinds = (tokens, columns, sum(depths)), (x.dtype, w.dtype)
        epilogue = activation != "none" or residual is not None or stages.count > 1
        config = choose("product", architecture(x.device), shape, kinds, run, epilogue, gradient)
    run(config)
    return partial


def launch_back(dz: Tensor, h: Tensor, g: Tensor, stages: Stages, spans: Sequence[int]) -> Tensor:
    """Fills g (T, R), the c_s · dz B_s side by side; returns (parts, R', m): h (T, R')ᵀ · dz over some tokens each."""
    if _in_one_pass(dz, stages):
        return _launch_thin_reduce(dz, h, g, stages, spans)
    launch_thin(dz, stages.b, g, dz.shape[1], stages, spans, reads_spans=True)
    return launch_reduce(h, dz)


def _in_one_pass(dz: Tensor, stages: Stages) -> bool:
    """Whether `_thin_reduce` is for them: more or wider numbers spill, and gfx1100 would gather its tile from shared
    memory in 16-bit loads."""
    return dz.dtype.itemsize == 2 and stages.block_r <= 32 and architecture(dz.device) != "gfx1100"


def _launch_thin_reduce(dz: Tensor, h: Tensor, g: Tensor, stages: Stages, spans: Sequence[int]) -> Tensor:
    """`launch_back` in one pass over dz; a part is a tile of tokens."""
    tokens, columns = dz.shape
    most, warps = (64, 4) if architecture(dz.device) == "gfx942" else (128, 8)  # a larger tile spills there
    block_t, block_c = min(most, max(16, triton.next_power_of_2(tokens))), 32
    parts = triton.cdiv(tokens, block_t)
    tiles = sum(triton.cdiv(length, block_c) for length in spans[1::2])
    per_split = triton.cdiv(tiles, max(1, min(tiles, 128 // parts)))
    splits = triton.cdiv(tiles, per_split)
    partial_g = torch.empty((splits, stages.width, tokens), dtype=torch.float32, device=dz.device)
    partial = torch.empty((parts, h.shape[1], columns), dtype=torch.float32, device=dz.device)
    _thin_reduce[(parts, splits)](
        dz, h, *stages.three(stages.b, dz), partial_g, partial, tokens, columns, h.shape[1], tiles, per_split,
        dz.stride(0), h.stride(0), stages.b[0].stride(0), *(stages.scales + [0.0] * 3)[:3], *six(spans),
        STAGES=stages.count, RANK=stages.rank, SPANS=len(spans) // 2, PRECISION=precision_of(dz), BLOCK_T=block_t,
        BLOCK_C=block_c, BLOCK_R=stages.block_r, num_warps=warps, num_stages=3,
    )  # fmt: skip
    launch_finish(partial_g, g, 0, stages.width, [0, tokens], transposed=True)
    if stages.vector is not None:
        g.mul_(stages.vector)
    return partial


def launch_reduce(g: Tensor, x: Tensor) -> Tensor:
    """(parts, R, C): Σ_t g[t, q] x[t, c] over each chunk of tokens; the chunks follow from the shape alone."""
    tokens, ranks, columns = x.shape[0], g.shape[1], x.shape[1]
    block_r = min(64, max(16, triton.next_power_of_2(ranks)))
    block_t, block_c = 64, 64
    chunk = chunk_of(tokens, columns, block_t, block_c)
    parts = triton.cdiv(tokens, chunk)
    partial = torch.empty((parts, ranks, columns), dtype=torch.float32, device=x.device)
    _reduce[(triton.cdiv(columns, block_c), parts, triton.cdiv(ranks, block_r))](
        g, x, partial, tokens, ranks, columns, chunk, g.stride(0), x.stride(0), PRECISION=precision_of(x),
        BLOCK_T=block_t, BLOCK_C=block_c, BLOCK_R=block_r, num_warps=4, num_stages=3,
    )  # fmt: skip
    return partial


def launch_finish(partial: Tensor, out: Tensor, first: int, rank: int, spans: Sequence[int], transposed: bool) -> None:
    parts, ranks, _ = partial.shape
    out_q, out_c = (out.stride(1), out.stride(0)) if transposed else out.stride()
    block_c, block_r = 64, min(64, triton.next_power_of_2(rank))
    tiles = sum(triton.cdiv(length, block_c) for length in spans[1::2])
    _finish[(tiles, triton.cdiv(rank, block_r))](
        partial, out, parts, first, rank, ranks, partial.stride(1), out_q, out_c, *six(spans),
        SPANS=len(spans) // 2, BLOCK_C=block_c, BLOCK_R=block_r, num_warps=4,
    )  # fmt: skip


def chunk_of(tokens: int, columns: int, block_t: int, block_c: int) -> int:
    """Tokens that one program of a reduction sums over: enough programs for a GPU, whole tiles."""
    parts = max(1, min(triton.cdiv(tokens, 4 * block_t), 256 // triton.cdiv(columns, block_c)))
    return triton.cdiv(triton.cdiv(tokens, parts), block_t) * block_t


def trained_ranks(lora_a: Sequence[Tensor], trains: Sequence[bool]) -> tuple[slice, list[int]]:
    """Of all stages' ranks side by side: from the first to the last that trains, and each stage's start in that."""
    ends = list(accumulate_sizes(a.shape[0] for a in lora_a))
    starts = [0, *ends[:-1]]
    live = [s for s, train in enumerate(trains) if train]
    return slice(starts[live[0]], ends[live[-1]]), [start - starts[live[0]] for start in starts]


def in_launches(spans: Sequence[int]) -> list[list[int]]:
    """Spans that have rows, in groups of at most three."""
    flat = [pair for pair in pairs_of(spans) if pair[1]]
    groups = [flat[i : i + MAX_SPANS] for i in range(0, len(flat), MAX_SPANS)]
    return [[number for pair in group for number in pair] for group in groups]


def pairs_of(spans: Sequence[int]) -> list[tuple[int, int]]:
    return list(zip(spans[::2], spans[1::2], strict=True))


def six(spans: Sequence[int]) -> list[int]:
    return (list(spans) + [0] * 6)[:6]


def with_rows(x: Tensor) -> Tensor:
    """x with contiguous rows, as it is if they are."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _with_rows_or_none(x: Tensor | None) -> Tensor | None:
    return None if x is None else with_rows(x)


def _or(tensor: Tensor | None, otherwise: Tensor) -> Tensor:
    return otherwise if tensor is None else tensor


def precision_of(x: Tensor) -> str:
    """tf32 where PyTorch's own matrix products take it."""
    arch = architecture(x.device)
    if arch == "interpreter":
        return "interpreted"
    allowed = x.dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest"
    return "tf32" if allowed and arch.startswith("sm") else "ieee"
