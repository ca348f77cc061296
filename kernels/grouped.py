"""Several sliced products over one W in one launch: each group of tokens has its own n and spans of W's rows.

x is (T, N) and y (T, M), both at full width: a group reads its leading n columns and writes the columns of its spans;
the rest of y is zero. Each program makes one tile of a table, which is ordered by W's rows first, so that the tiles of
W that groups share are still in the cache when the next group reads them. (A persistent kernel that goes over the table
takes up to 92 registers more for the same loop: 210 instead of 122 on sm90, forward, in tiles of 128 × 128.) The
arithmetic of a tile is that of `sliced_linear`. The table depends on sizes only; it is made once for each and kept.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Protocol

import torch
import triton
import triton.language as tl
from torch import Tensor

from mlfs.kernels.configs import Config, architecture, choose, thin, unroll
from mlfs.kernels.sliced_linear import (
    Stages,
    accumulate,
    chunk_of,
    dot,
    launch_finish,
    precision_of,
    readable,
    stage_of,
    trained_ranks,
    with_rows,
)

FIELDS = 8  # of a group, in memory: n, then (start, length) of up to three spans, and 1; all 0 for zeros


class Group(Protocol):
    """`tokens` consecutive rows of x from `first` on that read `n` columns and write `spans`; hashable."""

    first: int
    tokens: int
    n: int
    spans: tuple[int, ...]


@triton.jit
def _thin(
    x, p0, p1, p2, h, table, groups, x_t, h_t, p_q, p_k, c0, c1, c2,
    STAGES: tl.constexpr, RANK: tl.constexpr, SPANS: tl.constexpr, EVEN_K: tl.constexpr, ALIGN: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, FIELDS: tl.constexpr,
):  # fmt: skip
    """h[t, q] = c_s · Σ_k x[t, k] · P_s[k, r], over the n or the spans of the group that the tile of tokens is in."""
    entry = table + tl.program_id(0) * 3
    t, end = tl.load(entry) + tl.arange(0, BLOCK_T), tl.load(entry + 1)
    in_rows = t < end
    group = groups + tl.load(entry + 2) * FIELDS
    q = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    in_ranks = q < STAGES * RANK
    k = tl.arange(0, BLOCK_K).to(tl.int64)
    xs = x + tl.minimum(t, end - 1).to(tl.int64)[:, None] * x_t + k[None, :]
    read, mask = readable(q, STAGES * RANK, SPANS == 0)
    ps = (stage_of(read, p0, p1, p2, RANK, STAGES) + (read % RANK) * p_q)[None, :] + k[:, None] * p_k
    acc = tl.zeros((BLOCK_T, BLOCK_R), tl.float32)
    if SPANS == 0:
        depth = tl.load(group) * ALIGN
        acc = accumulate(acc, xs, ps, depth, p_k, mask, SPANS == 0, BLOCK_K, EVEN_K, PRECISION)
    for i in tl.static_range(SPANS):
        start = tl.load(group + 1 + 2 * i).to(tl.int64) * ALIGN
        depth = tl.load(group + 2 + 2 * i) * ALIGN
        acc = accumulate(acc, xs + start, ps + start * p_k, depth, p_k, mask, SPANS == 0, BLOCK_K, EVEN_K, PRECISION)
    acc *= stage_of(q, c0, c1, c2, RANK, STAGES)
    out = h + t.to(tl.int64)[:, None] * h_t + q[None, :]
    tl.store(out, acc.to(h.dtype.element_ty), mask=in_rows[:, None] & in_ranks[None, :])


@triton.jit
def _product(
    x, w, bias, h, p0, p1, p2, y, table, groups, x_t, h_t, w_k, w_c, p_q, p_c, y_t,
    STAGES: tl.constexpr, RANK: tl.constexpr, SPANS: tl.constexpr, UNROLL: tl.constexpr, UNIT_K: tl.constexpr,
    EVEN_K: tl.constexpr, ALIGN: tl.constexpr, HAS_BIAS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, FIELDS: tl.constexpr,
):  # fmt: skip
    """Tiles of y; SPANS = 0: over each group's n (forward), else over its spans (backward); zeros off the groups."""
    entry = table + tl.program_id(0) * 5
    t, end = tl.load(entry) + tl.arange(0, BLOCK_T), tl.load(entry + 1)
    c = tl.load(entry + 2) * ALIGN + tl.arange(0, BLOCK_C)
    c_end = tl.load(entry + 3) * ALIGN
    in_rows, in_columns = t < end, c < c_end
    t64, c64 = t.to(tl.int64), c.to(tl.int64)
    group = groups + tl.load(entry + 4) * FIELDS
    k = tl.arange(0, BLOCK_K).to(tl.int64)
    xs = tl.minimum(t, end - 1).to(tl.int64)[:, None] * x_t + k[None, :]
    read, mask = readable(c, c_end, UNIT_K)
    ws = w + read.to(tl.int64)[None, :] * w_c + k[:, None] * w_k
    acc = tl.zeros((BLOCK_T, BLOCK_C), tl.float32)
    if SPANS == 0:
        depth = tl.load(group) * ALIGN
        acc = accumulate(acc, x + xs, ws, depth, w_k, mask, UNIT_K, BLOCK_K, EVEN_K, PRECISION)
    for s in tl.range(SPANS, loop_unroll_factor=UNROLL):
        start, depth = tl.load(group + 1 + 2 * s) * ALIGN, tl.load(group + 2 + 2 * s) * ALIGN
        ks = ws + start.to(tl.int64) * w_k
        acc = accumulate(acc, x + start + xs, ks, depth, w_k, mask, UNIT_K, BLOCK_K, EVEN_K, PRECISION)
    for r in tl.static_range(0, STAGES * RANK, BLOCK_R):
        q = r + tl.arange(0, BLOCK_R)
        in_ranks = q < STAGES * RANK
        hs = h + t64[:, None] * h_t + q[None, :]
        ps = (stage_of(q, p0, p1, p2, RANK, STAGES) + (q % RANK) * p_q)[:, None] + c64[None, :] * p_c
        a = tl.load(hs, mask=in_rows[:, None] & in_ranks[None, :], other=0.0)
        b = tl.load(ps, mask=in_ranks[:, None] & in_columns[None, :], other=0.0)
        acc = dot(a, b, acc, PRECISION)
    if HAS_BIAS:
        acc += tl.load(bias + c64, mask=in_columns, other=0.0).to(tl.float32)[None, :]
    acc = tl.where(tl.load(group + FIELDS - 1) > 0, acc, 0.0)
    out = y + t64[:, None] * y_t + c64[None, :]
    tl.store(out, acc.to(y.dtype.element_ty), mask=in_rows[:, None] & in_columns[None, :])


@triton.jit
def _reduce(
    g, x, partial, chunks, groups, ranks, columns, g_t, x_t,
    SPANS: tl.constexpr, ALIGN: tl.constexpr, PRECISION: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr, FIELDS: tl.constexpr,
):  # fmt: skip
    """partial[i, q, c] = Σ_t g[t, q] · x[t, c] over chunk i of tokens, for the columns its group reads (SPANS = 0) or
    writes; zero elsewhere."""
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    part = tl.program_id(1)
    q = tl.program_id(2) * BLOCK_R + tl.arange(0, BLOCK_R)
    first, end = tl.load(chunks + part * 3), tl.load(chunks + part * 3 + 1)
    group = groups + tl.load(chunks + part * 3 + 2) * FIELDS
    if SPANS == 0:
        live = c < tl.load(group) * ALIGN
    else:
        live = c < 0
        for s in tl.static_range(SPANS):
            start = tl.load(group + 1 + 2 * s) * ALIGN
            live = live | ((c >= start) & (c < start + tl.load(group + 2 + 2 * s) * ALIGN))
    in_ranks, in_columns = q < ranks, c < columns
    t = first.to(tl.int64) + tl.arange(0, BLOCK_T)
    gs = g + t[None, :] * g_t + q[:, None]
    xs = x + t[:, None] * x_t + c[None, :]
    acc = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    for start in range(first, end, BLOCK_T):
        inside = tl.arange(0, BLOCK_T) < end - start
        a = tl.load(gs, mask=in_ranks[:, None] & inside[None, :], other=0.0)
        b = tl.load(xs, mask=inside[:, None] & (in_columns & live)[None, :], other=0.0)
        acc = dot(a, b, acc, PRECISION)
        gs += tl.full((), BLOCK_T, tl.int64) * g_t
        xs += tl.full((), BLOCK_T, tl.int64) * x_t
    out = (part.to(tl.int64) * ranks + q)[:, None] * columns + c[None, :]
    tl.store(partial + out, acc, mask=in_ranks[:, None] & in_columns[None, :])


# ---- launchers ------------------------------------------------------------------------------------------------------


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Sequence[Tensor],
    lora_b: Sequence[Tensor],
    scales: Sequence[float],
    groups: tuple[Group, ...],
    config: Config | None = None,
) -> tuple[Tensor, Tensor]:
    """(y (T, M), h (T, R)) for x (T, N): each group's product, zeros off its spans and where no group is."""
    x, bias = with_rows(x), None if bias is None else bias.contiguous()
    stages = Stages.pack(lora_a, lora_b, scales)
    y = x.new_empty((x.shape[0], weight.shape[0]))
    h = x.new_zeros((x.shape[0], stages.width))
    if not groups:
        return y.zero_(), h
    if y.numel():
        _launch_thin(x, stages.a, h, stages, groups, reads_spans=False)
        _launch_product(x, weight.t(), bias, h, stages.b, stages, groups, False, y, config)
    return y, h


def backward(
    dy: Tensor,
    x: Tensor | None,
    h: Tensor | None,
    weight: Tensor,
    lora_a: Sequence[Tensor],
    lora_b: Sequence[Tensor],
    scales: Sequence[float],
    groups: tuple[Group, ...],
    trains: Sequence[bool],
    needs_dx: bool,
    config: Config | None = None,
) -> list[Tensor]:
    """[dx (T, N), or (0, N) unless needed; dA_s, dB_s of each stage that trains] from dy (T, M) and h of `forward`.

    What dy holds off a group's spans is not read.
    """
    dy = with_rows(dy)
    stages = Stages.pack(lora_a, lora_b, scales)
    dx = dy.new_empty((dy.shape[0] if needs_dx else 0, weight.shape[1]))
    gradients = [torch.zeros_like(t) for s, train in enumerate(trains) if train for t in (lora_a[s], lora_b[s])]
    if not dy.numel() or not groups:
        return [dx.zero_(), *gradients]
    g = dy.new_zeros((dy.shape[0], stages.width))
    _launch_thin(dy, stages.b, g, stages, groups, reads_spans=True)
    if needs_dx:
        _launch_product(dy, weight, None, g, stages.a, stages, groups, True, dx, config)
    if any(trains):
        assert x is not None and h is not None
        ranks, starts = trained_ranks(lora_a, trains)
        partial_a = _launch_reduce(g[:, ranks], with_rows(x), groups, reads_spans=False)
        partial_b = _launch_reduce(h[:, ranks], dy, groups, reads_spans=True)
        goals = iter(gradients)
        for s, train in enumerate(trains):
            if train:
                place, rank = starts[s], lora_a[s].shape[0]
                launch_finish(partial_a, next(goals), place, rank, [0, weight.shape[1]], transposed=False)
                launch_finish(partial_b, next(goals), place, rank, [0, weight.shape[0]], transposed=True)
    return [dx, *gradients]


def _launch_thin(
    x: Tensor, p: list[Tensor], h: Tensor, stages: Stages, groups: tuple[Group, ...], reads_spans: bool
) -> None:
    if not stages.width:
        return
    block_t, (block_k, pipeline) = 16, thin(x.device, max(x.dtype.itemsize, p[0].dtype.itemsize))
    p_q, p_k = (1, p[0].stride(0)) if reads_spans else (p[0].stride(0), 1)
    table, align = _token_tiles(groups, block_t, x.device), _alignment(groups)
    depths = [n for group in groups for n in (group.spans[1::2] if reads_spans else (group.n,))]
    _thin[(table.shape[0], triton.cdiv(stages.width, stages.block_r))](
        x, *stages.three(p, x), h, table, _fields(groups, align, x.device), x.stride(0), h.stride(0), p_q, p_k,
        *(stages.scales + [0.0] * 3)[:3], STAGES=stages.count, RANK=stages.rank, SPANS=_spans(groups, reads_spans),
        EVEN_K=all(depth % block_k == 0 for depth in depths), ALIGN=align, PRECISION=precision_of(x),
        BLOCK_T=block_t, BLOCK_K=block_k, BLOCK_R=stages.block_r, FIELDS=FIELDS, num_warps=4, num_stages=pipeline,
    )  # fmt: skip
    if stages.vector is not None:
        h.mul_(stages.vector)


def _launch_product(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    h: Tensor,
    p: list[Tensor],
    stages: Stages,
    groups: tuple[Group, ...],
    reads_spans: bool,
    y: Tensor,
    config: Config | None = None,
) -> None:
    p_q, p_c = (0, 0) if not p else (p[0].stride(0), 1) if reads_spans else (1, p[0].stride(0))
    depths = [n for group in groups for n in (group.spans[1::2] if reads_spans else (group.n,))]
    align, spans = _alignment(groups, y.shape[1]), _spans(groups, reads_spans)

    def run(config: Config) -> None:
        table = _tiles(groups, y.shape[0], y.shape[1], config.block_t, config.block_c, reads_spans, align, x.device)
        _product[(table.shape[0],)](
            x, w, x if bias is None else bias, h if stages.width else x, *stages.three(p, x), y, table,
            _fields(groups, align, x.device), x.stride(0), h.stride(0), *w.stride(), p_q, p_c, y.stride(0),
            STAGES=stages.count, RANK=max(stages.rank, 1), SPANS=spans, UNROLL=unroll(x.device, spans),
            UNIT_K=w.stride(0) == 1, EVEN_K=all(depth % config.block_k == 0 for depth in depths), ALIGN=align,
            HAS_BIAS=bias is not None, PRECISION=precision_of(x), BLOCK_T=config.block_t, BLOCK_C=config.block_c,
            BLOCK_K=config.block_k, BLOCK_R=stages.block_r, FIELDS=FIELDS, num_warps=config.warps,
            num_stages=config.stages,
        )  # fmt: skip

    if config is None:
        shape, kinds = (*y.shape, x.shape[1]), (x.dtype, w.dtype)
        config = choose("grouped", architecture(x.device), shape, kinds, run, epilogue=stages.count > 1)
    run(config)


def _launch_reduce(g: Tensor, x: Tensor, groups: tuple[Group, ...], reads_spans: bool) -> Tensor:
    """(parts, R, C) of chunks of tokens, none of which crosses from one group into another."""
    ranks, columns = g.shape[1], x.shape[1]
    block_r = min(64, max(16, triton.next_power_of_2(ranks)))
    block_t, block_c, align = 64, 64, _alignment(groups)
    tokens = sum(group.tokens for group in groups)
    chunks = _token_tiles(groups, chunk_of(tokens, columns, block_t, block_c), x.device)
    partial = torch.empty((chunks.shape[0], ranks, columns), dtype=torch.float32, device=x.device)
    _reduce[(triton.cdiv(columns, block_c), chunks.shape[0], triton.cdiv(ranks, block_r))](
        g, x, partial, chunks, _fields(groups, align, x.device), ranks, columns, g.stride(0), x.stride(0),
        SPANS=_spans(groups, reads_spans), ALIGN=align, PRECISION=precision_of(x), BLOCK_T=block_t,
        BLOCK_C=block_c, BLOCK_R=block_r, FIELDS=FIELDS, num_warps=4, num_stages=3,
    )  # fmt: skip
    return partial


def _spans(groups: tuple[Group, ...], reads_spans: bool) -> int:
    return max(1, *(len(group.spans) // 2 for group in groups)) if reads_spans else 0


@lru_cache(maxsize=1024)
def _alignment(groups: tuple[Group, ...], columns: int = 0) -> int:
    """16 if all that is read and written starts and ends at a multiple of it, else 1.

    Tables hold columns in units of it, so that the compiler can tell which loads are aligned and that no mask cuts one:
    told in numbers, it loads two bytes at once (a main loop of 874 instructions, not 155: sm100, backward, 128 × 64).
    """
    return 16 if columns % 16 == 0 and all(n % 16 == 0 for group in groups for n in (group.n, *group.spans)) else 1


@lru_cache(maxsize=1024)
def _fields(groups: tuple[Group, ...], align: int, device: torch.device) -> Tensor:
    rows = []
    for group in groups:
        pairs = zip(group.spans[::2], group.spans[1::2], strict=True)
        spans = [number // align for pair in pairs for number in pair]
        rows.append([group.n // align, *spans, *[0] * (FIELDS - 2 - len(spans)), 1])
    rows.append([0] * FIELDS)
    return torch.tensor(rows, dtype=torch.int32, device=device)


@lru_cache(maxsize=1024)
def _token_tiles(groups: tuple[Group, ...], block: int, device: torch.device) -> Tensor:
    """(first token, end, group) of tiles of at most `block` tokens."""
    rows = [
        (t, min(t + block, group.first + group.tokens), i)
        for i, group in enumerate(groups)
        for t in range(group.first, group.first + group.tokens, block)
    ]
    return torch.tensor(rows, dtype=torch.int32, device=device)


@lru_cache(maxsize=1024)
def _tiles(
    groups: tuple[Group, ...],
    tokens: int,
    columns: int,
    block_t: int,
    block_c: int,
    backward: bool,
    align: int,
    device: torch.device,
) -> Tensor:
    """(first token, end, first column and end in units of `align`, group) of the tiles of y.

    The group after the last has no sizes: zeros.
    """
    rows, zeros = [], len(groups)
    for i, group in enumerate(groups):
        spans = (0, group.n) if backward else group.spans
        live = [(a, a + k) for a, k in zip(spans[::2], spans[1::2], strict=True) if k]
        rows += [(*tile, i) for tile in _cover(group.first, group.tokens, live, block_t, block_c)]
        rows += [(*tile, zeros) for tile in _cover(group.first, group.tokens, _gaps(live, columns), block_t, block_c)]
    covered = [(group.first, group.first + group.tokens) for group in groups]
    for first, end in _gaps(covered, tokens):
        rows += [(*tile, zeros) for tile in _cover(first, end - first, [(0, columns)], block_t, block_c)]
    rows.sort(key=lambda row: (row[4] == zeros, row[2], row[0]))
    units = [(t, t_end, c // align, c_end // align, group) for t, t_end, c, c_end, group in rows]
    return torch.tensor(units, dtype=torch.int32, device=device)


def _cover(first: int, tokens: int, parts: list[tuple[int, int]], block_t: int, block_c: int) -> list[tuple[int, ...]]:
    return [
        (t, min(t + block_t, first + tokens), c, min(c + block_c, end))
        for start, end in parts
        for c in range(start, end, block_c)
        for t in range(first, first + tokens, block_t)
    ]


def _gaps(parts: list[tuple[int, int]], size: int) -> list[tuple[int, int]]:
    """What `parts` leave of range(size)."""
    edges, gaps = 0, []
    for start, end in sorted(parts):
        if start > edges:
            gaps.append((edges, start))
        edges = max(edges, end)
    return [*gaps, (edges, size)] if edges < size else gaps
