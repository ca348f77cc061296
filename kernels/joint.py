"""Several linear layers over one x (formula: `mlfs.ops.joint_linear`), by the kernels of `sliced_linear` and two more.

All adapters' x A_sᵀ, side by side, come from one thin launch, all dA from one reduction over x. `_together` makes every
y in one launch: a tile is of one layer or, gated, of both, so that nothing is written to be read back. `_sum` makes dx:
its loop goes over every layer's dy and W in turn, into one accumulator: no summand is written. Each W is read in place.
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mlfs.kernels.configs import Config, architecture, choose, unroll
from mlfs.kernels.epilogue import apply_activation
from mlfs.kernels.sliced_linear import (
    Stages,
    accumulate,
    add_stages,
    launch_back,
    launch_finish,
    launch_reduce,
    launch_thin,
    nth,
    precision_of,
    readable,
    span_of,
    tile_of,
    with_rows,
)


@triton.jit
def _together(
    x, w0, w1, w2, b0, b1, b2, h, p00, p01, p02, p10, p11, p12, p20, p21, p22, y0, y1, y2, z,
    tokens, depth, m0, m1, m2, x_t, h_t, w0_k, w0_c, w1_k, w1_c, w2_k, w2_c,
    LAYERS: tl.constexpr, STAGES: tl.constexpr, RANK: tl.constexpr, GATED: tl.constexpr, KEEP: tl.constexpr,
    SELECTS: tl.constexpr, HAS_BIAS: tl.constexpr, UNIT_K: tl.constexpr, EVEN_K: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """One BLOCK_T × BLOCK_C tile of one y_i = x · W_iᵀ + h_i · B_iᵀ + b_i; p_is: B of stage s, (M, R).

    GATED: of y_0 = SiLU(z) · y_1, where z is what the first layer makes; KEEP: z and y_1 are written, too. SELECTS: in
    one loop, over pointers to the layer's W, or, gated, to half a tile of either W; else in a loop for each W.
    """
    WIDTH: tl.constexpr = BLOCK_C // 2 if GATED and SELECTS else BLOCK_C  # columns of each layer
    tile_t, tile_c = tile_of(tokens, BLOCK_T, GROUP)
    if GATED:
        layer, length, tile = 0, m0, tile_c
    else:
        layer, length, _, tile = span_of(tile_c, 0, m0, 1, m1, 2, m2, LAYERS, BLOCK_C)
    t, k = tile_t * BLOCK_T + tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_K).to(tl.int64)
    r, first = tile * WIDTH + tl.arange(0, BLOCK_C) % WIDTH, tl.arange(0, BLOCK_C) < WIDTH
    r64, in_rows, inside = r.to(tl.int64), t < tokens, r < length
    xs = x + tl.minimum(t, tokens - 1).to(tl.int64)[:, None] * x_t + k[None, :]
    read, mask = readable(r, length, UNIT_K)
    rows, depths = read.to(tl.int64)[None, :], k[:, None]
    acc = tl.zeros((BLOCK_T, BLOCK_C), tl.float32)
    up = acc
    if SELECTS:
        if GATED:  # selects whole tiles of pointers: of a row of them, what is known of their alignment would be lost
            ws, w_k = w0 + rows * w0_c + depths * w0_k, tl.where(first[None, :], w0_k, w1_k)
            ws = tl.where(first[None, :], ws, w1 + rows * w1_c + depths * w1_k)
        else:
            w_k, w_c = nth(layer, w0_k, w1_k, w2_k, LAYERS), nth(layer, w0_c, w1_c, w2_c, LAYERS)
            ws = nth(layer, w0, w1, w2, LAYERS) + rows * w_c + depths * w_k
        acc = accumulate(acc, xs, ws, depth, w_k, mask, UNIT_K, BLOCK_K, EVEN_K, PRECISION)
    else:  # loops over other layers' W take no step
        ws, steps = w0 + rows * w0_c + depths * w0_k, depth if GATED else tl.where(layer == 0, depth, 0)
        acc = accumulate(acc, xs, ws, steps, w0_k, mask, UNIT_K, BLOCK_K, EVEN_K, PRECISION)
        ws = w1 + rows * w1_c + depths * w1_k
        if GATED:
            up = accumulate(up, xs, ws, depth, w1_k, mask, UNIT_K, BLOCK_K, EVEN_K, PRECISION)
        else:
            steps = tl.where(layer == 1, depth, 0)
            acc = accumulate(acc, xs, ws, steps, w1_k, mask, UNIT_K, BLOCK_K, EVEN_K, PRECISION)
        if LAYERS > 2:
            ws, steps = w2 + rows * w2_c + depths * w2_k, tl.where(layer == 2, depth, 0)
            acc = accumulate(acc, xs, ws, steps, w2_k, mask, UNIT_K, BLOCK_K, EVEN_K, PRECISION)
    if GATED:
        one, two, h1 = inside & first, (inside & ~first) if SELECTS else inside, h + STAGES * RANK
        acc = add_stages(acc, h, p00, p01, p02, t, in_rows, r64, one, h_t, 1, RANK, STAGES, RANK, BLOCK_R, PRECISION)
        if SELECTS:  # before the tile is split: products of its parts would let none of the loop's overlap on sm90
            up = acc
        up = add_stages(up, h1, p10, p11, p12, t, in_rows, r64, two, h_t, 1, RANK, STAGES, RANK, BLOCK_R, PRECISION)
        if SELECTS:
            acc, up = tl.split(tl.permute(tl.reshape(up, (BLOCK_T, 2, WIDTH)), (0, 2, 1)))
    else:
        p0, p1 = nth(layer, p00, p10, p20, LAYERS), nth(layer, p01, p11, p21, LAYERS)
        p2, hs = nth(layer, p02, p12, p22, LAYERS), h + layer * STAGES * RANK
        acc = add_stages(acc, hs, p0, p1, p2, t, in_rows, r64, inside, h_t, 1, RANK, STAGES, RANK, BLOCK_R, PRECISION)

    c = tile * WIDTH + tl.arange(0, WIDTH)
    in_columns = c < length
    out, mask = t.to(tl.int64)[:, None] * length + c[None, :], in_rows[:, None] & in_columns[None, :]
    if HAS_BIAS:
        acc += tl.load(nth(layer, b0, b1, b2, LAYERS) + c, mask=in_columns, other=0.0).to(tl.float32)[None, :]
    if GATED:
        if HAS_BIAS:
            up += tl.load(b1 + c, mask=in_columns, other=0.0).to(tl.float32)[None, :]
        if KEEP:
            tl.store(z + out, acc.to(z.dtype.element_ty), mask=mask)
            tl.store(y1 + out, up.to(y1.dtype.element_ty), mask=mask)
        acc = apply_activation(acc, up, "silu_mul")
    y = nth(layer, y0, y1, y2, LAYERS)
    tl.store(y + out, acc.to(y.dtype.element_ty), mask=mask)


@triton.jit
def _sum(
    d0, d1, d2, w0, w1, w2, g, p0, p1, p2, residual, dx, tokens, columns, m0, m1, m2, d0_t, d1_t, d2_t, w0_k, w0_c,
    w1_k, w1_c, w2_k, w2_c, g_t, p_q, p_c, residual_t,
    LAYERS: tl.constexpr, STAGES: tl.constexpr, RANK: tl.constexpr, HAS_RESIDUAL: tl.constexpr, UNROLL: tl.constexpr,
    EVEN_K: tl.constexpr, PRECISION: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """One BLOCK_T × BLOCK_C tile of dx = Σ_i d_i · W_i + g · P + residual, over the m_i rows of each W_i."""
    tile_t, tile_c = tile_of(tokens, BLOCK_T, GROUP)
    t, c = tile_t * BLOCK_T + tl.arange(0, BLOCK_T), tile_c * BLOCK_C + tl.arange(0, BLOCK_C)
    in_rows, in_columns = t < tokens, c < columns
    t64, c64, k = tl.minimum(t, tokens - 1).to(tl.int64)[:, None], c.to(tl.int64), tl.arange(0, BLOCK_K).to(tl.int64)
    acc = tl.zeros((BLOCK_T, BLOCK_C), tl.float32)
    for i in tl.range(LAYERS, loop_unroll_factor=UNROLL):
        d, w, m = nth(i, d0, d1, d2, LAYERS), nth(i, w0, w1, w2, LAYERS), nth(i, m0, m1, m2, LAYERS)
        w_k, w_c = nth(i, w0_k, w1_k, w2_k, LAYERS), nth(i, w0_c, w1_c, w2_c, LAYERS)
        xs, ws = d + t64 * nth(i, d0_t, d1_t, d2_t, LAYERS) + k[None, :], w + c64[None, :] * w_c + k[:, None] * w_k
        acc = accumulate(acc, xs, ws, m, w_k, in_columns, False, BLOCK_K, EVEN_K, PRECISION)
    acc = add_stages(acc, g, p0, p1, p2, t, in_rows, c64, in_columns, g_t, p_q, p_c, STAGES, RANK, BLOCK_R, PRECISION)
    t64, mask = t.to(tl.int64)[:, None], in_rows[:, None] & in_columns[None, :]
    if HAS_RESIDUAL:
        acc += tl.load(residual + t64 * residual_t + c64[None, :], mask=mask, other=0.0).to(tl.float32)
    tl.store(dx + t64 * columns + c64[None, :], acc.to(dx.dtype.element_ty), mask=mask)


# ---- launchers ------------------------------------------------------------------------------------------------------


def forward(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    lora_a: Sequence[Tensor],
    lora_b: Sequence[Tensor],
    scales: Sequence[float],
    rows: Sequence[int],
    gated: bool,
    keep: bool,
    config: Config | None = None,
) -> tuple[list[Tensor], Tensor, Tensor]:
    """([y_i (T, m_i)], h (T, R) of all stages of all layers, side by side, z) for two or three layers and x (T, n).

    lora_a, lora_b, scales: of the first layer's stages, then of the second's, ...; all of one rank. biases: of all or
    none. gated: the first of two is silu(z) · the second; with `keep` z (T, m), else z and the second are of size 0.
    config: tiles of the product; chosen if None.
    """
    x, depth, tokens = with_rows(x), x.shape[1], x.shape[0]
    stages = Stages.pack(lora_a, [], scales)
    h = x.new_empty((tokens, stages.width))
    ys = [x.new_empty((tokens, 0 if gated and i and not keep else m)) for i, m in enumerate(rows)]
    z = x.new_empty((tokens, rows[0]) if gated and keep else 0)
    if tokens:
        launch_thin(x, stages.a, h, depth, stages, [0, depth], reads_spans=False)
        own = _of_each(len(weights), lora_a, lora_b, scales)
        _launch_together(x, weights, [bias.contiguous() for bias in biases], h, own, rows, ys, z, gated, keep, config)
    return ys, h, z


def backward(
    dys: Sequence[Tensor],
    x: Tensor | None,
    h: Tensor | None,
    weights: Sequence[Tensor],
    lora_a: Sequence[Tensor],
    lora_b: Sequence[Tensor],
    scales: Sequence[float],
    trains: Sequence[bool],
    needs_dx: bool,
    columns: int,
    config: Config | None = None,
    residual: Tensor | None = None,
) -> list[Tensor]:
    """[dx (T, columns), or (0, columns) unless needed; dA, dB of each stage that trains] from dy_i (T, m_i) and h.

    residual: (T, columns), added to dx.
    """
    dys, tokens = [with_rows(dy) for dy in dys], dys[0].shape[0]
    all_stages, own = Stages.pack(lora_a, [], scales), _of_each(len(weights), lora_a, lora_b, scales)
    dx = dys[0].new_empty((tokens if needs_dx else 0, columns))
    live = [s for s, train in enumerate(trains) if train]
    das, dbs = ([torch.zeros_like(ts[s]) for s in live] for ts in (lora_a, lora_b))
    if tokens:
        g = dys[0].new_empty((tokens, all_stages.width))
        goals = dict(zip(live, dbs, strict=True))
        for i in reversed(range(len(dys))):  # attention's gradients of values are the last ones it makes
            dy, stages = dys[i], own[i]
            place, spans = _place(i, own), [0, dy.shape[1]]
            first = i * len(lora_a) // len(weights)
            if mine := [s for s in live if 0 <= s - first < len(lora_a) // len(weights)]:
                assert h is not None
                partial = launch_back(dy, h[:, place], g[:, place], stages, spans)
                for s in mine:
                    rank = lora_a[s].shape[0]
                    launch_finish(partial, goals[s], (s - first) * rank, rank, spans, transposed=True)
            elif stages.width:
                launch_thin(dy, stages.b, g[:, place], dy.shape[1], stages, spans, reads_spans=True)
        if live:
            assert x is not None
            partial = launch_reduce(g, with_rows(x))
            for s, da in zip(live, das, strict=True):
                rank = lora_a[s].shape[0]
                launch_finish(partial, da, s * rank, rank, [0, columns], transposed=False)
        if needs_dx:
            _launch_sum(dys, weights, g, all_stages, residual, dx, config)
    return [dx, *(t for pair in zip(das, dbs, strict=True) for t in pair)]


def _of_each(layers: int, lora_a: Sequence[Tensor], lora_b: Sequence[Tensor], scales: Sequence[float]) -> list[Stages]:
    """The stages of each layer."""
    count = len(lora_a) // layers
    parts = [slice(i * count, (i + 1) * count) for i in range(layers)]
    return [Stages.pack(lora_a[part], lora_b[part], scales[part]) for part in parts]


def _place(i: int, own: Sequence[Stages]) -> slice:
    """Of layer i's stages, in h and g."""
    return slice(i * own[0].width, (i + 1) * own[0].width)


def _launch_together(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    h: Tensor,
    own: Sequence[Stages],
    rows: Sequence[int],
    ys: Sequence[Tensor],
    z: Tensor,
    gated: bool,
    keep: bool,
    config: Config | None,
) -> None:
    (tokens, depth), selects = x.shape, _selects(x.device)

    def run(config: Config) -> None:
        width = config.block_c // 2 if gated and selects else config.block_c
        tiles_c = sum(triton.cdiv(m, width) for m in (rows[:1] if gated else rows))
        _together[(triton.cdiv(tokens, config.block_t) * tiles_c,)](
            x, *_three(weights), *_three(biases or [x]), h if own[0].width else x,
            *(p for stages in _three(own) for p in stages.three(stages.b, x)), *_three(ys), z, tokens, depth,
            *_three(rows), x.stride(0), h.stride(0),
            *(stride for w in _three(weights) for stride in (w.stride(1), w.stride(0))), LAYERS=len(weights),
            STAGES=own[0].count, RANK=max(own[0].rank, 1), GATED=gated, KEEP=keep, SELECTS=selects,
            HAS_BIAS=bool(biases), UNIT_K=all(w.stride(1) == 1 for w in weights), EVEN_K=depth % config.block_k == 0,
            PRECISION=precision_of(x), BLOCK_T=config.block_t, BLOCK_C=config.block_c, BLOCK_K=config.block_k,
            BLOCK_R=own[0].block_r, GROUP=config.group, num_warps=config.warps, num_stages=config.stages,
        )  # fmt: skip

    shape, kinds, epilogue = (tokens, sum(rows), depth), (x.dtype, weights[0].dtype), gated or own[0].count > 1
    run(config or choose("joint forward", architecture(x.device), shape, kinds, run, epilogue))


def _selects(device: torch.device) -> bool:
    """Whether loops go over selected pointers. AMD's compiler makes buffer loads only of pointers that are arguments:
    of others, a step takes 1 to 17 instructions more."""
    return not architecture(device).startswith("gfx")


def _launch_sum(
    dys: Sequence[Tensor],
    weights: Sequence[Tensor],
    g: Tensor,
    stages: Stages,
    residual: Tensor | None,
    dx: Tensor,
    config: Config | None,
) -> None:
    sizes = [dy.shape[1] for dy in dys]
    residual = None if residual is None else with_rows(residual)

    def run(config: Config) -> None:
        tiles = triton.cdiv(dx.shape[0], config.block_t) * triton.cdiv(dx.shape[1], config.block_c)
        _sum[(tiles,)](
            *_three(dys), *_three(weights), g if stages.width else dx, *stages.three(stages.a, dx),
            dx if residual is None else residual, dx, *dx.shape, *_three(sizes), *_three([dy.stride(0) for dy in dys]),
            *(stride for strides in _three([w.stride() for w in weights]) for stride in strides),
            g.stride(0), stages.a[0].stride(0) if stages.a else 0, 1, 0 if residual is None else residual.stride(0),
            LAYERS=len(weights), STAGES=stages.count, RANK=max(stages.rank, 1), HAS_RESIDUAL=residual is not None,
            UNROLL=unroll(dx.device, len(weights)), EVEN_K=all(size % config.block_k == 0 for size in sizes),
            PRECISION=precision_of(dx), BLOCK_T=config.block_t, BLOCK_C=config.block_c, BLOCK_K=config.block_k,
            BLOCK_R=stages.block_r, GROUP=config.group, num_warps=config.warps, num_stages=config.stages,
        )  # fmt: skip

    shape, kinds = (*dx.shape, sum(sizes)), (dx.dtype, weights[0].dtype)
    run(config or choose("joint", architecture(dx.device), shape, kinds, run, epilogue=True))


def _three(values: Sequence[Any]) -> list[Any]:
    return [*values, values[0], values[0]][:3]
