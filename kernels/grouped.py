"""Several sliced products over one W in one launch: each group of tokens has its own n and spans of W's rows.

x is (T, N) and y (T, M), both at full width: a group reads its leading n columns and writes the columns of its spans;
the rest of y is zero. Each program makes one tile of a table, which is ordered by W's rows first, so that the tiles of
W that groups share are still in the cache when the next group reads them. (A persistent kernel that goes over the table
takes up to 92 registers more for the same loop: 210 instead of 122 on sm90, forward, in tiles of 128 × 128.) The
arithmetic of a tile is that of `product`. The table depends on sizes only; it is made once for each and kept.
"""

from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mlfs.kernels.arguments import (
    Arguments,
    Stages,
    block_of_ranks,
    divides,
    optional,
    pairs_of,
    precision_of,
    tile_arguments,
    with_rows,
)
from mlfs.kernels.configs import Config, architecture, choose, thin, unroll
from mlfs.kernels.reductions import Gradients, chunk_of
from mlfs.kernels.tiles import accumulate, add_stages, readable, rows_of, stage_of, sum_over_tokens

if TYPE_CHECKING:
    from mlfs.ops.grouped_linear import Group
    from mlfs.ops.layer import LowRankLinear, Wanted

FIELDS = 8  # of a group, in memory: n, then (start, length) of up to three spans, and 1; all 0 for zeros


@triton.jit
def _thin(
    x, stage0, stage1, stage2, h, table, groups, x_t, h_t, stage_q, stage_k, scale0, scale1, scale2,
    STAGES: tl.constexpr, RANK: tl.constexpr, SPANS: tl.constexpr, EVEN_K: tl.constexpr, ALIGN: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, FIELDS: tl.constexpr,
):  # fmt: skip
    """h[t, q] = c_s · Σ_k x[t, k] · P_s[k, r], over the n or the spans of the group that the tile of tokens is in."""
    entry = table + tl.program_id(0) * 3
    t, end = tl.load(entry) + tl.arange(0, BLOCK_T), tl.load(entry + 1)
    group = groups + tl.load(entry + 2) * FIELDS
    q = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    k = tl.arange(0, BLOCK_K).to(tl.int64)
    in_rows, in_ranks = t < end, q < STAGES * RANK
    xs = rows_of(x, t, end, x_t, k)
    read, mask = readable(q, STAGES * RANK, SPANS == 0)
    stage = stage_of(read, stage0, stage1, stage2, RANK, STAGES) + (read % RANK) * stage_q
    ps = stage[None, :] + k[:, None] * stage_k
    acc = tl.zeros((BLOCK_T, BLOCK_R), tl.float32)
    if SPANS == 0:
        depth = tl.load(group) * ALIGN
        acc = accumulate(acc, xs, ps, depth, stage_k, mask, SPANS == 0, BLOCK_K, EVEN_K, PRECISION)
    for i in tl.static_range(SPANS):
        start = tl.load(group + 1 + 2 * i).to(tl.int64) * ALIGN
        depth = tl.load(group + 2 + 2 * i) * ALIGN
        ks = ps + start * stage_k
        acc = accumulate(acc, xs + start, ks, depth, stage_k, mask, SPANS == 0, BLOCK_K, EVEN_K, PRECISION)
    acc *= stage_of(q, scale0, scale1, scale2, RANK, STAGES)
    out = h + t.to(tl.int64)[:, None] * h_t + q[None, :]
    tl.store(out, acc.to(h.dtype.element_ty), mask=in_rows[:, None] & in_ranks[None, :])


@triton.jit
def _tile(table, groups, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr, ALIGN: tl.constexpr, FIELDS: tl.constexpr):
    """This program's tile of the result: (tokens, their end, columns, their end, fields of the group)."""
    entry = table + tl.program_id(0) * 5
    t, t_end = tl.load(entry) + tl.arange(0, BLOCK_T), tl.load(entry + 1)
    c, c_end = tl.load(entry + 2) * ALIGN + tl.arange(0, BLOCK_C), tl.load(entry + 3) * ALIGN
    return t, t_end, c, c_end, groups + tl.load(entry + 4) * FIELDS


@triton.jit
def _store(y, acc, t, in_rows, c, in_columns, y_t, group, FIELDS: tl.constexpr):
    """Writes a tile of y: acc, or zeros where no group is."""
    acc = tl.where(tl.load(group + FIELDS - 1) > 0, acc, 0.0)
    out = y + t.to(tl.int64)[:, None] * y_t + c[None, :]
    tl.store(out, acc.to(y.dtype.element_ty), mask=in_rows[:, None] & in_columns[None, :])


@triton.jit
def _forward(
    x, w, bias, h, stage0, stage1, stage2, y, table, groups, x_t, h_t, w_k, w_c, stage_c, y_t,
    STAGES: tl.constexpr, RANK: tl.constexpr, UNIT_K: tl.constexpr, EVEN_K: tl.constexpr, ALIGN: tl.constexpr,
    HAS_BIAS: tl.constexpr, PRECISION: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, FIELDS: tl.constexpr,
):  # fmt: skip
    """One BLOCK_T × BLOCK_C tile of y = x · Wᵀ + h · Bᵀ + bias over the n of its group."""
    t, t_end, c, c_end, group = _tile(table, groups, BLOCK_T, BLOCK_C, ALIGN, FIELDS)
    in_rows, in_columns = t < t_end, c < c_end
    c64, k = c.to(tl.int64), tl.arange(0, BLOCK_K).to(tl.int64)
    xs = rows_of(x, t, t_end, x_t, k)
    read, mask = readable(c, c_end, UNIT_K)
    ws = w + read.to(tl.int64)[None, :] * w_c + k[:, None] * w_k
    acc = tl.zeros((BLOCK_T, BLOCK_C), tl.float32)
    acc = accumulate(acc, xs, ws, tl.load(group) * ALIGN, w_k, mask, UNIT_K, BLOCK_K, EVEN_K, PRECISION)
    acc = add_stages(
        acc, h, stage0, stage1, stage2, t, in_rows, c64, in_columns, h_t, 1, stage_c, STAGES, RANK, BLOCK_R, PRECISION
    )
    if HAS_BIAS:
        acc += tl.load(bias + c64, mask=in_columns, other=0.0).to(tl.float32)[None, :]
    _store(y, acc, t, in_rows, c64, in_columns, y_t, group, FIELDS)


@triton.jit
def _backward(
    dy, w, g, stage0, stage1, stage2, dx, table, groups, dy_t, g_t, w_k, w_c, stage_q, dx_t,
    STAGES: tl.constexpr, RANK: tl.constexpr, SPANS: tl.constexpr, UNROLL: tl.constexpr, UNIT_K: tl.constexpr,
    EVEN_K: tl.constexpr, ALIGN: tl.constexpr, PRECISION: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, FIELDS: tl.constexpr,
):  # fmt: skip
    """One BLOCK_T × BLOCK_C tile of dx = dy · W + g · A over the spans of its group."""
    t, t_end, c, c_end, group = _tile(table, groups, BLOCK_T, BLOCK_C, ALIGN, FIELDS)
    in_rows, in_columns = t < t_end, c < c_end
    c64, k = c.to(tl.int64), tl.arange(0, BLOCK_K).to(tl.int64)
    read, mask = readable(c, c_end, UNIT_K)
    ws = w + read.to(tl.int64)[None, :] * w_c + k[:, None] * w_k
    acc = tl.zeros((BLOCK_T, BLOCK_C), tl.float32)
    for s in tl.range(SPANS, loop_unroll_factor=UNROLL):
        start, length = tl.load(group + 1 + 2 * s) * ALIGN, tl.load(group + 2 + 2 * s) * ALIGN
        ds, ks = rows_of(dy + start, t, t_end, dy_t, k), ws + start.to(tl.int64) * w_k
        acc = accumulate(acc, ds, ks, length, w_k, mask, UNIT_K, BLOCK_K, EVEN_K, PRECISION)
    acc = add_stages(
        acc, g, stage0, stage1, stage2, t, in_rows, c64, in_columns, g_t, stage_q, 1, STAGES, RANK, BLOCK_R, PRECISION
    )
    _store(dx, acc, t, in_rows, c64, in_columns, dx_t, group, FIELDS)


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
    in_ranks, in_columns = q < ranks, c < columns
    if SPANS == 0:
        is_read = c < tl.load(group) * ALIGN
    else:
        is_read = c < 0
        for s in tl.static_range(SPANS):
            start = tl.load(group + 1 + 2 * s) * ALIGN
            is_read = is_read | ((c >= start) & (c < start + tl.load(group + 2 + 2 * s) * ALIGN))
    sum_over_tokens(
        g, x, partial, part, first, end, g_t, x_t, q, in_ranks, c, in_columns, in_columns & is_read, ranks, columns,
        PRECISION, BLOCK_T, BLOCK_C, BLOCK_R,
    )  # fmt: skip


# ---- launchers ------------------------------------------------------------------------------------------------------

Groups = tuple["Group", ...]


def forward(x: Tensor, layer: "LowRankLinear", groups: Groups, config: Config | None = None) -> tuple[Tensor, Tensor]:
    """Applies a layer to x (T, N), each group of tokens at its own size.

    Args:
        layer: at full width; the groups' spans are read, not its own.
        groups: consecutive tokens (`first`, `tokens`) that read `n` columns of x and write `spans` of y; hashable.
        config: tiles of the product; chosen if None.

    Returns:
        y (T, M), zero off a group's spans and where no group is; and h (T, R), the c_s · x A_sᵀ side by side.
    """
    x, stages = with_rows(x), Stages.of(layer)
    y = x.new_empty((x.shape[0], layer.weight.shape[0]))
    h = x.new_zeros((x.shape[0], stages.width))
    if not groups:
        return y.zero_(), h
    if y.numel():
        _launch_thin(x, stages.a, h, stages, groups, reads_spans=False)
        weight, bias = layer.weight, None if layer.bias is None else layer.bias.contiguous()
        arguments = dict(
            bias=optional(bias, x), h=h if stages.width else x, **stages.pointers(stages.b, x), y=y,
            x_t=x.stride(0), h_t=h.stride(0), w_k=weight.stride(1), w_c=weight.stride(0),
            stage_c=stages.b_c, y_t=y.stride(0), **stages.sizes(),
            UNIT_K=weight.stride(1) == 1, HAS_BIAS=bias is not None,
        )  # fmt: skip
        _launch_product(_forward, x, weight, arguments, groups, config)
    return y, h


def backward(
    dy: Tensor,
    x: Tensor | None,
    h: Tensor | None,
    layer: "LowRankLinear",
    groups: Groups,
    wanted: "Wanted",
    config: Config | None = None,
) -> tuple[Tensor, list[Tensor]]:
    """Makes the gradients of `forward` from dy (T, M); what dy holds off a group's spans is not read.

    Args:
        x, h: (T, N), and what `forward` made of it; needed if a stage trains.
        layer, groups, config: as for `forward`.

    Returns:
        dx (T, N), or (0, N) unless wanted; and [dA_s, dB_s, ...] of each stage that trains.
    """
    dy, stages, gradients = with_rows(dy), Stages.of(layer), Gradients(layer, wanted.trains)
    dx = dy.new_empty((dy.shape[0] if wanted.dx else 0, wanted.columns))
    if not dy.numel() or not groups:
        return dx.zero_(), gradients.in_order()
    g = dy.new_zeros((dy.shape[0], stages.width))
    _launch_thin(dy, stages.b, g, stages, groups, reads_spans=True)
    if wanted.dx:
        weight, spans = layer.weight, _spans(groups)
        arguments = dict(
            g=g if stages.width else dy, **stages.pointers(stages.a, dy), dx=dx, dy_t=dy.stride(0), g_t=g.stride(0),
            w_k=weight.stride(0), w_c=weight.stride(1), stage_q=stages.a_q,
            dx_t=dx.stride(0), **stages.sizes(), SPANS=spans, UNROLL=unroll(dy.device, spans),
            UNIT_K=weight.stride(0) == 1,
        )  # fmt: skip
        _launch_product(_backward, dy, weight, arguments, groups, config)
    if gradients:
        assert x is not None and h is not None
        rows = [0, layer.weight.shape[0]]
        gradients.finish_a(_launch_reduce(g[:, gradients.ranks], with_rows(x), groups, reads_spans=False))
        partial = _launch_reduce(h[:, gradients.ranks], dy, groups, reads_spans=True)
        gradients.finish_b(partial, [(rows, slice(None))])
    return dx, gradients.in_order()


def _launch_thin(
    x: Tensor, matrices: list[Tensor], h: Tensor, stages: Stages, groups: Groups, reads_spans: bool
) -> None:
    """`reductions.launch_thin` of the columns of x that each group reads or, with `reads_spans`, writes."""
    if not stages.width:
        return
    row, align = matrices[0].stride(0), _alignment(groups)
    block_t, (block_k, pipeline) = 16, thin(x.device, max(x.dtype.itemsize, matrices[0].dtype.itemsize))
    table = _token_tiles(groups, block_t, x.device)
    _thin[(table.shape[0], triton.cdiv(stages.width, stages.block_r))](
        x, h=h, **stages.pointers(matrices, x), table=table, groups=_fields(groups, align, x.device),
        x_t=x.stride(0), h_t=h.stride(0), stage_q=1 if reads_spans else row, stage_k=row if reads_spans else 1,
        **stages.scale_arguments(), **stages.sizes(), SPANS=_spans(groups) if reads_spans else 0,
        EVEN_K=divides(block_k, _depths(groups, reads_spans)), ALIGN=align, PRECISION=precision_of(x),
        BLOCK_T=block_t, BLOCK_K=block_k, FIELDS=FIELDS, num_warps=4, num_stages=pipeline,
    )  # fmt: skip
    stages.rescale_(h)


def _launch_product(
    kernel: Any, x: Tensor, w: Tensor, arguments: Arguments, groups: Groups, config: Config | None
) -> None:
    """Launches `_forward` or `_backward` over a table of tiles."""
    is_backward = kernel is _backward
    y = arguments["dx" if is_backward else "y"]
    tokens, columns = y.shape
    align, depths = _alignment(groups, columns), _depths(groups, is_backward)

    def run(config: Config) -> None:
        table = _tiles(groups, tokens, columns, config.block_t, config.block_c, is_backward, align, x.device)
        kernel[(table.shape[0],)](
            x, w, **arguments, table=table, groups=_fields(groups, align, x.device),
            EVEN_K=divides(config.block_k, depths), ALIGN=align, FIELDS=FIELDS, PRECISION=precision_of(x),
            **tile_arguments(config),
        )  # fmt: skip

    if config is None:
        shape, dtypes = (tokens, columns, x.shape[1]), (x.dtype, w.dtype)
        config = choose("grouped", architecture(x.device), shape, dtypes, run, epilogue=arguments["STAGES"] > 1)
    run(config)


def _launch_reduce(g: Tensor, x: Tensor, groups: Groups, reads_spans: bool) -> Tensor:
    """Returns (parts, R, C) of chunks of tokens, none of which crosses from one group into another."""
    ranks, columns = g.shape[1], x.shape[1]
    block_t, block_c, block_r, align = 64, 64, block_of_ranks(ranks), _alignment(groups)
    tokens = sum(group.tokens for group in groups)
    chunks = _token_tiles(groups, chunk_of(tokens, columns, block_t, block_c), x.device)
    partial = torch.empty((chunks.shape[0], ranks, columns), dtype=torch.float32, device=x.device)
    _reduce[(triton.cdiv(columns, block_c), chunks.shape[0], triton.cdiv(ranks, block_r))](
        g, x, partial, chunks=chunks, groups=_fields(groups, align, x.device), ranks=ranks, columns=columns,
        g_t=g.stride(0), x_t=x.stride(0), SPANS=_spans(groups) if reads_spans else 0, ALIGN=align,
        PRECISION=precision_of(x), BLOCK_T=block_t, BLOCK_C=block_c, BLOCK_R=block_r, FIELDS=FIELDS, num_warps=4,
        num_stages=3,
    )  # fmt: skip
    return partial


# ---- tables ----------------------------------------------------------------------------------------------------------


def _spans(groups: Groups) -> int:
    """How many spans the kernels go over: those of the group that has most."""
    return max(1, *(len(group.spans) // 2 for group in groups))


def _depths(groups: Groups, reads_spans: bool) -> list[int]:
    """Over how many columns of x, or with `reads_spans` of dy, products sum."""
    if reads_spans:
        return [length for group in groups for length in group.spans[1::2]]
    return [group.n for group in groups]


@lru_cache(maxsize=1024)
def _alignment(groups: Groups, columns: int = 0) -> int:
    """16 if all that is read and written starts and ends at a multiple of it, else 1.

    Tables hold columns in units of it, so that the compiler can tell which loads are aligned and that no mask cuts one:
    told in numbers, it loads two bytes at once (a main loop of 874 instructions, not 155: sm100, backward, 128 × 64).
    """
    return 16 if columns % 16 == 0 and all(n % 16 == 0 for group in groups for n in (group.n, *group.spans)) else 1


@lru_cache(maxsize=1024)
def _fields(groups: Groups, align: int, device: torch.device) -> Tensor:
    rows = []
    for group in groups:
        spans = [number // align for number in group.spans]
        rows.append([group.n // align, *spans, *[0] * (FIELDS - 2 - len(spans)), 1])
    rows.append([0] * FIELDS)
    return torch.tensor(rows, dtype=torch.int32, device=device)


@lru_cache(maxsize=1024)
def _token_tiles(groups: Groups, block: int, device: torch.device) -> Tensor:
    """(first token, end, group) of tiles of at most `block` tokens."""
    rows = [
        (t, min(t + block, group.first + group.tokens), i)
        for i, group in enumerate(groups)
        for t in range(group.first, group.first + group.tokens, block)
    ]
    return torch.tensor(rows, dtype=torch.int32, device=device)


@lru_cache(maxsize=1024)
def _tiles(
    groups: Groups,
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
        live = [(start, start + length) for start, length in pairs_of(spans) if length]
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
