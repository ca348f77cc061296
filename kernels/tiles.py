"""What the kernels share on the device: how a tile of a product finds its place, reads and multiplies.

Names, here and in every kernel:

    x, w, y      a product's operands and result; its sizes are tokens, depth (what is summed over) and columns
    h, g         c_s · x A_sᵀ, and c_s · dy B_s, of all stages side by side: (tokens, ranks)
    t, k, c, q   indices along tokens, depth, columns and ranks
    x_t, w_k     strides: of x along t, of w along k. A stride that is not named is 1
    NAME         is known when a kernel is compiled (tl.constexpr), BLOCK_T is the size of a tile along t

What belongs to one of up to three stages, spans or layers is numbered: stage0, start1, w2. Programs that have fewer are
given any value for the others, and do not look at it.
"""

import triton
import triton.language as tl


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """acc + a · b, with b cast to a's type. "interpreted": in fp32, as Triton's interpreter cannot multiply bf16."""
    b = b.to(a.dtype)
    if PRECISION == "interpreted":
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    return tl.dot(a, b, acc, input_precision=PRECISION)


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
def span_of(tile, start0, length0, start1, length1, start2, length2, SPANS: tl.constexpr, BLOCK: tl.constexpr):
    """Of the span that column tile `tile` is in: (first row of W, length, first column of the result, tile within)."""
    start, length, column = start0, length0, tile * 0
    if SPANS > 1:
        tiles = tl.cdiv(length0, BLOCK)
        beyond = tile >= tiles
        tile = tl.where(beyond, tile - tiles, tile)
        start = tl.where(beyond, start1, start)
        length = tl.where(beyond, length1, length)
        column = tl.where(beyond, length0, column)
        if SPANS > 2:
            tiles = tl.where(beyond, tl.cdiv(length1, BLOCK), 0x7FFFFFFF)
            beyond = tile >= tiles
            tile = tl.where(beyond, tile - tiles, tile)
            start = tl.where(beyond, start2, start)
            length = tl.where(beyond, length2, length)
            column = tl.where(beyond, length0 + length1, column)
    return start, length, column, tile


@triton.jit
def readable(i, end, CLAMP: tl.constexpr):
    """(Indices to read, mask) of those before `end`. CLAMP: beyond it the last one is read again, nothing is masked."""
    mask = i < end
    if CLAMP:
        i, mask = tl.minimum(i, end - 1), tl.full(i.shape, True, tl.int1)
    return i, mask


@triton.jit
def rows_of(x, t, tokens, x_t, k):
    """Pointers (T, K) to columns k of rows t of x. Rows beyond the last are the last one again, so that none of them
    needs a mask."""
    return x + tl.minimum(t, tokens - 1).to(tl.int64)[:, None] * x_t + k[None, :]


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
def add_stages(
    acc, h, stage0, stage1, stage2, t, in_rows, c, in_columns, h_t, stage_q, stage_c,
    STAGES: tl.constexpr, RANK: tl.constexpr, BLOCK_R: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """acc + h · Q, with Q the stages (ranks, columns): the last steps of a product's loop over [.. | h] · [.. | Q].

    All addresses come before the loads: with h loaded before Q's are made, the product's own loop has 88 instructions,
    not 80 (sm80, forward, 32 × 64 × 64, three stages).
    """
    for first in tl.static_range(0, STAGES * RANK, BLOCK_R):
        q = first + tl.arange(0, BLOCK_R)
        in_ranks = q < STAGES * RANK
        hs = h + t.to(tl.int64)[:, None] * h_t + q[None, :]
        stage = stage_of(q, stage0, stage1, stage2, RANK, STAGES) + (q % RANK) * stage_q
        qs = stage[:, None] + c[None, :] * stage_c
        a = tl.load(hs, mask=in_rows[:, None] & in_ranks[None, :], other=0.0)
        b = tl.load(qs, mask=in_ranks[:, None] & in_columns[None, :], other=0.0)
        acc = dot(a, b, acc, PRECISION)
    return acc


@triton.jit
def sum_over_tokens(
    g, x, partial, part, first, end, g_t, x_t, q, in_ranks, c, in_columns, is_read, ranks, columns,
    PRECISION: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """partial[part, q, c] = Σ_t g[t, q] · x[t, c] over tokens first ≤ t < end, with x taken as 0 unless c `is_read`."""
    t = first.to(tl.int64) + tl.arange(0, BLOCK_T)
    gs = g + t[None, :] * g_t + q[:, None]
    xs = x + t[:, None] * x_t + c[None, :]
    acc = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    for start in range(first, end, BLOCK_T):
        inside = tl.arange(0, BLOCK_T) < end - start
        a = tl.load(gs, mask=in_ranks[:, None] & inside[None, :], other=0.0)
        b = tl.load(xs, mask=inside[:, None] & is_read[None, :], other=0.0)
        acc = dot(a, b, acc, PRECISION)
        gs += tl.full((), BLOCK_T, tl.int64) * g_t
        xs += tl.full((), BLOCK_T, tl.int64) * x_t
    out = (part.to(tl.int64) * ranks + q)[:, None] * columns + c[None, :]
    tl.store(partial + out, acc, mask=in_ranks[:, None] & in_columns[None, :])
