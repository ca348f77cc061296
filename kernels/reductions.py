"""Sums beside the products of low-rank stages: what their narrow matrices are multiplied with, and their gradients.

h = c_s · x A_sᵀ,  g = c_s · dy B_s     `_thin`: (tokens, ranks) of all stages side by side
dA_s = g_sᵀ x,     dB_s = dyᵀ h_s       `_reduce`: over some tokens each; `_finish` adds the parts in a fixed order
g and dB from one pass over dy          `_thin_reduce`
"""

from collections.abc import Sequence
from itertools import accumulate as accumulate_sizes
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from mlfs.kernels.arguments import Stages, block_of_ranks, divides, precision_of, span_arguments, with_rows
from mlfs.kernels.configs import architecture, thin
from mlfs.kernels.tiles import accumulate, dot, readable, rows_of, span_of, stage_of, sum_over_tokens

if TYPE_CHECKING:
    from mlfs.ops.layer import LowRankLinear


@triton.jit
def _thin(
    x, stage0, stage1, stage2, h, tokens, depth, x_t, h_t, stage_q, stage_k, scale0, scale1, scale2,
    start0, length0, start1, length1, start2, length2,
    STAGES: tl.constexpr, RANK: tl.constexpr, SPANS: tl.constexpr, EVEN_K: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """h[t, q] = c_s · Σ_k x[t, k] · P_s[k, r] with q = s · RANK + r and P the stages; k runs over `depth`, or, with
    SPANS, over spans of P's rows."""
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    q = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    k = tl.arange(0, BLOCK_K).to(tl.int64)
    in_rows, in_ranks = t < tokens, q < STAGES * RANK
    xs = rows_of(x, t, tokens, x_t, k)
    read, mask = readable(q, STAGES * RANK, SPANS == 0)
    ps = stage_of(read, stage0, stage1, stage2, RANK, STAGES) + (read % RANK) * stage_q
    acc = tl.zeros((BLOCK_T, BLOCK_R), tl.float32)
    if SPANS == 0:
        ks = ps[None, :] + k[:, None] * stage_k
        acc = accumulate(acc, xs, ks, depth, stage_k, mask, SPANS == 0, BLOCK_K, EVEN_K, PRECISION)
    else:
        ks = ps[None, :] + (k + start0)[:, None] * stage_k
        acc = accumulate(acc, xs, ks, length0, stage_k, mask, SPANS == 0, BLOCK_K, EVEN_K, PRECISION)
    if SPANS > 1:
        ks = ps[None, :] + (k + start1)[:, None] * stage_k
        acc = accumulate(acc, xs + length0, ks, length1, stage_k, mask, SPANS == 0, BLOCK_K, EVEN_K, PRECISION)
    if SPANS > 2:
        ks = ps[None, :] + (k + start2)[:, None] * stage_k
        xs += length0 + length1
        acc = accumulate(acc, xs, ks, length2, stage_k, mask, SPANS == 0, BLOCK_K, EVEN_K, PRECISION)
    acc *= stage_of(q, scale0, scale1, scale2, RANK, STAGES)
    out = h + t.to(tl.int64)[:, None] * h_t + q[None, :]
    tl.store(out, acc.to(h.dtype.element_ty), mask=in_rows[:, None] & in_ranks[None, :])


@triton.jit
def _reduce(
    g, x, partial, tokens, ranks, columns, chunk, g_t, x_t,
    PRECISION: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """partial[i, q, c] = Σ_t g[t, q] · x[t, c] over the i-th chunk of tokens."""
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    part = tl.program_id(1)
    q = tl.program_id(2) * BLOCK_R + tl.arange(0, BLOCK_R)
    in_columns, in_ranks = c < columns, q < ranks
    end = tl.minimum(tokens, (part + 1) * chunk)
    sum_over_tokens(
        g, x, partial, part, part * chunk, end, g_t, x_t, q, in_ranks, c, in_columns, in_columns, ranks, columns,
        PRECISION, BLOCK_T, BLOCK_C, BLOCK_R,
    )  # fmt: skip


@triton.jit
def _thin_reduce(
    dy, h, stage0, stage1, stage2, partial_g, partial, tokens, columns, ranks, tiles, per_split, dy_t, h_t, stage_c,
    scale0, scale1, scale2, start0, length0, start1, length1, start2, length2,
    STAGES: tl.constexpr, RANK: tl.constexpr, SPANS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """`_thin` of dy over some column tiles and `_reduce` of it over some tokens, from one pass over dy:

    partial_g[j, q, t] = c_s · Σ_c dy[t, c] · B_s[row(c), r]    over the j-th of the column tiles' splits
    partial[i, q, c]   = Σ_t h[t, q] · dy[t, c]                 over the i-th BLOCK_T tokens
    """
    part, split = tl.program_id(0), tl.program_id(1)
    t = part * BLOCK_T + tl.arange(0, BLOCK_T)
    q = tl.arange(0, BLOCK_R)
    in_rows, in_stages, in_ranks = t < tokens, q < STAGES * RANK, q < ranks
    t64 = t.to(tl.int64)
    hs = tl.load(h + t64[None, :] * h_t + q[:, None], mask=in_ranks[:, None] & in_rows[None, :], other=0.0)
    stage = (stage_of(q, stage0, stage1, stage2, RANK, STAGES) + q % RANK)[None, :]
    acc = tl.zeros((BLOCK_T, BLOCK_R), tl.float32)
    for tile in range(split * per_split, tl.minimum(tiles, (split + 1) * per_split)):
        start, length, offset, within = span_of(tile, start0, length0, start1, length1, start2, length2, SPANS, BLOCK_C)
        c = within * BLOCK_C + tl.arange(0, BLOCK_C)
        in_columns, column = c < length, offset + c
        d = tl.load(dy + t64[:, None] * dy_t + column[None, :], mask=in_rows[:, None] & in_columns[None, :], other=0.0)
        rows = stage + (start + c).to(tl.int64)[:, None] * stage_c
        b = tl.load(rows, mask=in_columns[:, None] & in_stages[None, :], other=0.0)
        acc = dot(d, b, acc, PRECISION)
        sums = dot(hs, d, tl.zeros((BLOCK_R, BLOCK_C), tl.float32), PRECISION)
        out = (part.to(tl.int64) * ranks + q)[:, None] * columns + column[None, :]
        tl.store(partial + out, sums, mask=in_ranks[:, None] & in_columns[None, :])
    acc *= stage_of(q, scale0, scale1, scale2, RANK, STAGES)
    out = (split.to(tl.int64) * STAGES * RANK + q)[None, :] * tokens + t64[:, None]
    tl.store(partial_g + out, acc, mask=in_rows[:, None] & in_stages[None, :])


@triton.jit
def _finish(
    partial, out, parts, first, rank, ranks, columns, out_q, out_c, start0, length0, start1, length1, start2, length2,
    SPANS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """out[r, row(c)] = Σ_i partial[i, first + r, c], i in order: the same sum on every run."""
    start, length, offset, tile = span_of(
        tl.program_id(0), start0, length0, start1, length1, start2, length2, SPANS, BLOCK_C
    )
    c = tile * BLOCK_C + tl.arange(0, BLOCK_C)
    r = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    mask = (r < rank)[:, None] & (c < length)[None, :]
    source = partial + (first + r).to(tl.int64)[:, None] * columns + (offset + c)[None, :]
    acc = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    for _ in range(parts):
        acc += tl.load(source, mask=mask, other=0.0)
        source += tl.full((), 1, tl.int64) * ranks * columns
    place = out + r.to(tl.int64)[:, None] * out_q + (start + c).to(tl.int64)[None, :] * out_c
    tl.store(place, acc.to(out.dtype.element_ty), mask=mask)


# ---- launchers ------------------------------------------------------------------------------------------------------


def launch_thin(
    x: Tensor, matrices: list[Tensor], h: Tensor, stages: Stages, spans: Sequence[int] | None = None
) -> None:
    """Fills h (T, R) with the c_s · x P_s of all stages side by side.

    Args:
        x: (T, K), contiguous rows.
        matrices: of each stage A (r, K), whose transpose P is; or, with `spans`, B (M, r), whose rows in the spans P
            is.
    """
    if not stages.width:
        return
    tokens, depth = x.shape
    row = matrices[0].stride(0)
    block_t = 16 if tokens <= 2048 else 32 if tokens <= 8192 else 64
    block_k, pipeline = thin(x.device, max(x.dtype.itemsize, matrices[0].dtype.itemsize))
    depths = [depth] if spans is None else spans[1::2]
    _thin[(triton.cdiv(tokens, block_t), triton.cdiv(stages.width, stages.block_r))](
        x, h=h, **stages.pointers(matrices, x),
        tokens=tokens, depth=depth, x_t=x.stride(0), h_t=h.stride(0),
        stage_q=row if spans is None else 1, stage_k=1 if spans is None else row,
        **stages.scale_arguments(), **span_arguments(spans or ()), **stages.sizes(),
        EVEN_K=divides(block_k, depths), PRECISION=precision_of(x),
        BLOCK_T=block_t, BLOCK_K=block_k, num_warps=4, num_stages=pipeline,
    )  # fmt: skip
    stages.rescale_(h)


def launch_reduce(g: Tensor, x: Tensor) -> Tensor:
    """Returns (parts, R, C): Σ_t g[t, q] x[t, c] over each chunk of tokens; the chunks follow from the shape alone."""
    tokens, ranks, columns = x.shape[0], g.shape[1], x.shape[1]
    block_t, block_c, block_r = 64, 64, block_of_ranks(ranks)
    chunk = chunk_of(tokens, columns, block_t, block_c)
    parts = triton.cdiv(tokens, chunk)
    partial = torch.empty((parts, ranks, columns), dtype=torch.float32, device=x.device)
    _reduce[(triton.cdiv(columns, block_c), parts, triton.cdiv(ranks, block_r))](
        g, x, partial, tokens=tokens, ranks=ranks, columns=columns, chunk=chunk, g_t=g.stride(0), x_t=x.stride(0),
        PRECISION=precision_of(x), BLOCK_T=block_t, BLOCK_C=block_c, BLOCK_R=block_r, num_warps=4, num_stages=3,
    )  # fmt: skip
    return partial


def launch_thin_and_reduce(dy: Tensor, h: Tensor, g: Tensor, stages: Stages, spans: Sequence[int]) -> Tensor:
    """Fills g (T, R), the c_s · dy B_s side by side; returns (parts, R', m): h (T, R')ᵀ · dy over some tokens each."""
    if _in_one_pass(dy, stages):
        return _launch_thin_reduce(dy, h, g, stages, spans)
    launch_thin(dy, stages.b, g, stages, spans)
    return launch_reduce(h, dy)


def _in_one_pass(dy: Tensor, stages: Stages) -> bool:
    """Whether `_thin_reduce` is for them: more or wider numbers spill, and gfx1100 would gather its tile from shared
    memory in 16-bit loads."""
    return dy.dtype.itemsize == 2 and stages.block_r <= 32 and architecture(dy.device) != "gfx1100"


def _launch_thin_reduce(dy: Tensor, h: Tensor, g: Tensor, stages: Stages, spans: Sequence[int]) -> Tensor:
    """`launch_thin_and_reduce` in one pass over dy; a part is a tile of tokens."""
    (tokens, columns), ranks = dy.shape, h.shape[1]
    most, warps = (64, 4) if architecture(dy.device) == "gfx942" else (128, 8)  # a larger tile spills there
    block_t, block_c = min(most, max(16, triton.next_power_of_2(tokens))), 32
    parts = triton.cdiv(tokens, block_t)
    tiles = sum(triton.cdiv(length, block_c) for length in spans[1::2])
    per_split = triton.cdiv(tiles, max(1, min(tiles, 128 // parts)))
    splits = triton.cdiv(tiles, per_split)
    partial_g = torch.empty((splits, stages.width, tokens), dtype=torch.float32, device=dy.device)
    partial = torch.empty((parts, ranks, columns), dtype=torch.float32, device=dy.device)
    _thin_reduce[(parts, splits)](
        dy, h, partial_g=partial_g, partial=partial, **stages.pointers(stages.b, dy),
        tokens=tokens, columns=columns, ranks=ranks, tiles=tiles, per_split=per_split,
        dy_t=dy.stride(0), h_t=h.stride(0), stage_c=stages.b_c,
        **stages.scale_arguments(), **span_arguments(spans), **stages.sizes(),
        PRECISION=precision_of(dy), BLOCK_T=block_t, BLOCK_C=block_c, num_warps=warps, num_stages=3,
    )  # fmt: skip
    launch_finish(partial_g, g, 0, transposed=True)
    stages.rescale_(g)
    return partial


def launch_finish(
    partial: Tensor, out: Tensor, first: int, spans: Sequence[int] | None = None, transposed: bool = False
) -> None:
    """Adds up parts (parts, R, C) into out (r, N) or, `transposed`, (N, r).

    Args:
        first: which rank of the parts out's first is.
        spans: where the C columns belong in N: flat (start, length) pairs; by default at the start.
    """
    parts, ranks, columns = partial.shape
    rank, (out_q, out_c) = out.shape[0], out.stride()
    if transposed:
        rank, (out_c, out_q) = out.shape[1], out.stride()
    spans = [0, columns] if spans is None else spans
    block_c, block_r = 64, min(64, triton.next_power_of_2(rank))
    tiles = sum(triton.cdiv(length, block_c) for length in spans[1::2])
    _finish[(tiles, triton.cdiv(rank, block_r))](
        partial, out, parts=parts, first=first, rank=rank, ranks=ranks, columns=partial.stride(1),
        out_q=out_q, out_c=out_c, **span_arguments(spans), BLOCK_C=block_c, BLOCK_R=block_r, num_warps=4,
    )  # fmt: skip


def chunk_of(tokens: int, columns: int, block_t: int, block_c: int) -> int:
    """Returns how many tokens one program of a reduction sums over: enough programs for a GPU, whole tiles."""
    parts = max(1, min(triton.cdiv(tokens, 4 * block_t), 256 // triton.cdiv(columns, block_c)))
    return triton.cdiv(triton.cdiv(tokens, parts), block_t) * block_t


# ---- gradients of the stages -----------------------------------------------------------------------------------------


class Gradients:
    """dA and dB of the stages that train, zeros off what is read.

    Attributes:
        a, b: the gradients, a pair for each stage that trains.
        ranks: of all stages' ranks side by side, from the first to the last that trains.
    """

    def __init__(self, layer: "LowRankLinear", trains: Sequence[bool]) -> None:
        self.live = [s for s, train in enumerate(trains) if train]
        self.a = [torch.zeros_like(layer.lora_a[s]) for s in self.live]
        self.b = [torch.zeros_like(layer.lora_b[s]) for s in self.live]
        ends = list(accumulate_sizes(a.shape[0] for a in layer.lora_a))
        starts = [0, *ends[:-1]]
        first = starts[self.live[0]] if self.live else 0
        self.ranks = slice(first, ends[self.live[-1]] if self.live else 0)
        self._places = [starts[s] - first for s in self.live]

    def __bool__(self) -> bool:
        """Whether any stage trains."""
        return bool(self.live)

    def finish_a(self, partial: Tensor) -> None:
        """Adds up the parts (parts, `ranks`, n) of dA."""
        for out, place in zip(self.a, self._places, strict=True):
            launch_finish(partial, out, place)

    def finish_b(self, partial: Tensor, launches: Sequence[tuple[Sequence[int], slice]]) -> None:
        """Adds up the parts (parts, `ranks`, m) of dB.

        Args:
            launches: spans of B's rows, as flat (start, length) pairs of at most three, and which of the m are theirs.
        """
        for out, place in zip(self.b, self._places, strict=True):
            for spans, columns in launches:
                launch_finish(partial[:, :, columns], out, place, spans, transposed=True)

    def reduce_a(self, g: Tensor, x: Tensor) -> None:
        """dA = gᵀ · x from g of all ranks (T, R) and x (T, n)."""
        self.finish_a(launch_reduce(g[:, self.ranks], with_rows(x)))

    def in_order(self) -> list[Tensor]:
        """Returns [dA_s, dB_s, ...]."""
        return [gradient for pair in zip(self.a, self.b, strict=True) for gradient in pair]
