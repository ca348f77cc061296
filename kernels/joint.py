"""Several linear layers over one x (formula: `mlfs.ops.joint_linear`), by `reductions` and two kernels of its own.

All adapters' x A_sᵀ, side by side, come from one thin launch, all dA from one reduction over x. `_forward` makes every
y in one launch: a tile is of one layer or, gated, of both, so that nothing is written to be read back. `_backward`
makes dx: its loop goes over every layer's dy and W in turn, into one accumulator: no summand is written. Each W is read
in place. Names: see `tiles`; stage12 is stage 2 of layer 1.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from mlfs.kernels.arguments import (
    Arguments,
    Stages,
    divides,
    numbered,
    optional,
    precision_of,
    rows_or_none,
    stride_or_zero,
    tile_arguments,
    with_rows,
)
from mlfs.kernels.configs import Config, architecture, choose, unroll
from mlfs.kernels.epilogue import apply_activation
from mlfs.kernels.reductions import launch_finish, launch_reduce, launch_thin, launch_thin_and_reduce
from mlfs.kernels.tiles import accumulate, add_stages, nth, readable, rows_of, span_of, tile_of

if TYPE_CHECKING:
    from mlfs.ops.layer import LowRankLinear, Wanted


@triton.jit
def _forward(
    x, w0, w1, w2, bias0, bias1, bias2, h, stage00, stage01, stage02, stage10, stage11, stage12,
    stage20, stage21, stage22, y0, y1, y2, z, tokens, depth, columns0, columns1, columns2, x_t, h_t,
    w0_k, w0_c, w1_k, w1_c, w2_k, w2_c,
    LAYERS: tl.constexpr, STAGES: tl.constexpr, RANK: tl.constexpr, GATED: tl.constexpr, KEEP: tl.constexpr,
    SELECTS: tl.constexpr, HAS_BIAS: tl.constexpr, UNIT_K: tl.constexpr, EVEN_K: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """One BLOCK_T × BLOCK_C tile of one y_i = x · W_iᵀ + h_i · B_iᵀ + b_i; the stages are B, (M, R).

    GATED: of y_0 = SiLU(z) · y_1, where z is what the first layer makes; KEEP: z and y_1 are written, too. SELECTS: in
    one loop, over pointers to the layer's W, or, gated, to half a tile of either W; else in a loop for each W.
    """
    WIDTH: tl.constexpr = BLOCK_C // 2 if GATED and SELECTS else BLOCK_C  # columns of each layer
    tile_t, tile_c = tile_of(tokens, BLOCK_T, GROUP)
    if GATED:
        layer, length, tile = 0, columns0, tile_c
    else:
        layer, length, _, tile = span_of(tile_c, 0, columns0, 1, columns1, 2, columns2, LAYERS, BLOCK_C)
    t = tile_t * BLOCK_T + tl.arange(0, BLOCK_T)
    k = tl.arange(0, BLOCK_K).to(tl.int64)
    r = tile * WIDTH + tl.arange(0, BLOCK_C) % WIDTH  # rows of W
    is_first = tl.arange(0, BLOCK_C) < WIDTH  # of two layers
    r64, in_rows, inside = r.to(tl.int64), t < tokens, r < length
    xs = rows_of(x, t, tokens, x_t, k)
    read, mask = readable(r, length, UNIT_K)
    rows, depths = read.to(tl.int64)[None, :], k[:, None]
    acc = tl.zeros((BLOCK_T, BLOCK_C), tl.float32)
    up = acc
    if SELECTS:
        if GATED:  # selects whole tiles of pointers: of a row of them, what is known of their alignment would be lost
            ws, w_k = w0 + rows * w0_c + depths * w0_k, tl.where(is_first[None, :], w0_k, w1_k)
            ws = tl.where(is_first[None, :], ws, w1 + rows * w1_c + depths * w1_k)
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
        in_first, in_second = inside & is_first, (inside & ~is_first) if SELECTS else inside
        acc = add_stages(
            acc, h, stage00, stage01, stage02, t, in_rows, r64, in_first, h_t, 1, RANK, STAGES, RANK, BLOCK_R, PRECISION
        )
        if SELECTS:  # before the tile is split: products of its parts would let none of the loop's overlap on sm90
            up = acc
        h1 = h + STAGES * RANK
        up = add_stages(
            up,
            h1,
            stage10,
            stage11,
            stage12,
            t,
            in_rows,
            r64,
            in_second,
            h_t,
            1,
            RANK,
            STAGES,
            RANK,
            BLOCK_R,
            PRECISION,
        )
        if SELECTS:
            acc, up = tl.split(tl.permute(tl.reshape(up, (BLOCK_T, 2, WIDTH)), (0, 2, 1)))
    else:
        stage0 = nth(layer, stage00, stage10, stage20, LAYERS)
        stage1 = nth(layer, stage01, stage11, stage21, LAYERS)
        stage2 = nth(layer, stage02, stage12, stage22, LAYERS)
        hs = h + layer * STAGES * RANK
        acc = add_stages(
            acc, hs, stage0, stage1, stage2, t, in_rows, r64, inside, h_t, 1, RANK, STAGES, RANK, BLOCK_R, PRECISION
        )

    c = tile * WIDTH + tl.arange(0, WIDTH)
    in_columns = c < length
    out, mask = t.to(tl.int64)[:, None] * length + c[None, :], in_rows[:, None] & in_columns[None, :]
    if HAS_BIAS:
        bias = nth(layer, bias0, bias1, bias2, LAYERS)
        acc += tl.load(bias + c, mask=in_columns, other=0.0).to(tl.float32)[None, :]
    if GATED:
        if HAS_BIAS:
            up += tl.load(bias1 + c, mask=in_columns, other=0.0).to(tl.float32)[None, :]
        if KEEP:
            tl.store(z + out, acc.to(z.dtype.element_ty), mask=mask)
            tl.store(y1 + out, up.to(y1.dtype.element_ty), mask=mask)
        acc = apply_activation(acc, up, "silu_mul")
    y = nth(layer, y0, y1, y2, LAYERS)
    tl.store(y + out, acc.to(y.dtype.element_ty), mask=mask)


@triton.jit
def _backward(
    dy0, dy1, dy2, w0, w1, w2, g, stage0, stage1, stage2, residual, dx, tokens, columns, depth0, depth1, depth2,
    dy0_t, dy1_t, dy2_t, w0_k, w0_c, w1_k, w1_c, w2_k, w2_c, g_t, stage_q, residual_t,
    LAYERS: tl.constexpr, STAGES: tl.constexpr, RANK: tl.constexpr, HAS_RESIDUAL: tl.constexpr, UNROLL: tl.constexpr,
    EVEN_K: tl.constexpr, PRECISION: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """One BLOCK_T × BLOCK_C tile of dx = Σ_i dy_i · W_i + g · A + residual, over the leading rows of each W_i; the
    stages are those of all layers' A."""
    tile_t, tile_c = tile_of(tokens, BLOCK_T, GROUP)
    t, c = tile_t * BLOCK_T + tl.arange(0, BLOCK_T), tile_c * BLOCK_C + tl.arange(0, BLOCK_C)
    in_rows, in_columns = t < tokens, c < columns
    c64, k = c.to(tl.int64), tl.arange(0, BLOCK_K).to(tl.int64)
    acc = tl.zeros((BLOCK_T, BLOCK_C), tl.float32)
    for i in tl.range(LAYERS, loop_unroll_factor=UNROLL):
        dy, dy_t = nth(i, dy0, dy1, dy2, LAYERS), nth(i, dy0_t, dy1_t, dy2_t, LAYERS)
        w, depth = nth(i, w0, w1, w2, LAYERS), nth(i, depth0, depth1, depth2, LAYERS)
        w_k, w_c = nth(i, w0_k, w1_k, w2_k, LAYERS), nth(i, w0_c, w1_c, w2_c, LAYERS)
        ds, ws = rows_of(dy, t, tokens, dy_t, k), w + c64[None, :] * w_c + k[:, None] * w_k
        acc = accumulate(acc, ds, ws, depth, w_k, in_columns, False, BLOCK_K, EVEN_K, PRECISION)
    acc = add_stages(
        acc, g, stage0, stage1, stage2, t, in_rows, c64, in_columns, g_t, stage_q, 1, STAGES, RANK, BLOCK_R, PRECISION
    )
    t64, mask = t.to(tl.int64)[:, None], in_rows[:, None] & in_columns[None, :]
    if HAS_RESIDUAL:
        acc += tl.load(residual + t64 * residual_t + c64[None, :], mask=mask, other=0.0).to(tl.float32)
    tl.store(dx + t64 * columns + c64[None, :], acc.to(dx.dtype.element_ty), mask=mask)


# ---- launchers ------------------------------------------------------------------------------------------------------


def forward(
    x: Tensor,
    layers: Sequence["LowRankLinear"],
    gated: bool = False,
    keep: bool = False,
    config: Config | None = None,
) -> tuple[list[Tensor], Tensor, Tensor]:
    """Applies two or three layers to one x (T, n).

    Args:
        layers: that read the leading rows of their weights, with as many stages each, all of one rank, and all with a
            bias or none.
        gated: of two layers of as many rows, y_0 is SiLU(z) · y_1, where z is what the first one makes.
        keep: whether gated z and y_1 are written.
        config: tiles of the product; chosen if None.

    Returns:
        y_i (T, m_i) of each; h (T, R), the c_s · x A_sᵀ of all stages of all layers side by side; and z (T, m). What is
        not made is of size 0.
    """
    x, tokens, stages = with_rows(x), x.shape[0], _stages_of_all(layers)
    rows = [layer.rows for layer in layers]
    h = x.new_empty((tokens, stages.width))
    ys = [x.new_empty((tokens, 0 if gated and i and not keep else m)) for i, m in enumerate(rows)]
    z = x.new_empty((tokens, rows[0]) if gated and keep else 0)
    if not tokens:
        return ys, h, z
    launch_thin(x, stages.a, h, stages)
    selects = _selects(x.device)
    arguments = _forward_arguments(x, layers, h) | dict(
        **numbered("y", ys), z=z, GATED=gated, KEEP=keep, SELECTS=selects
    )

    def run(config: Config) -> None:
        width = config.block_c // 2 if gated and selects else config.block_c
        tiles_c = sum(triton.cdiv(m, width) for m in (rows[:1] if gated else rows))
        _forward[(triton.cdiv(tokens, config.block_t) * tiles_c,)](
            x, **arguments, EVEN_K=divides(config.block_k, [x.shape[1]]), GROUP=config.group, **tile_arguments(config)
        )

    if config is None:
        shape, dtypes = (tokens, sum(rows), x.shape[1]), (x.dtype, layers[0].weight.dtype)
        does_more = gated or len(layers[0].scales) > 1
        config = choose("joint forward", architecture(x.device), shape, dtypes, run, does_more)
    run(config)
    return ys, h, z


def _forward_arguments(x: Tensor, layers: Sequence["LowRankLinear"], h: Tensor) -> Arguments:
    """Returns those of `_forward` that say what is read."""
    weights = [layer.weight for layer in layers]
    biases = [layer.bias.contiguous() for layer in layers if layer.bias is not None]
    own = [Stages.of(layer) for layer in layers]
    stages: Arguments = {}
    for i in range(3):
        stages |= _nth(own, i).pointers(_nth(own, i).b, x, f"stage{i}")
    return dict(
        **numbered("w", weights), **numbered("bias", biases or [x]), h=h if own[0].width else x, **stages,
        tokens=x.shape[0], depth=x.shape[1], **numbered("columns", [layer.rows for layer in layers]),
        x_t=x.stride(0), h_t=h.stride(0), **numbered("w{}_k", [w.stride(1) for w in weights]),
        **numbered("w{}_c", [w.stride(0) for w in weights]), **own[0].sizes(), LAYERS=len(layers),
        HAS_BIAS=bool(biases), UNIT_K=all(w.stride(1) == 1 for w in weights), PRECISION=precision_of(x),
    )  # fmt: skip


def _selects(device: torch.device) -> bool:
    """Whether loops go over selected pointers. AMD's compiler makes buffer loads only of pointers that are arguments:
    of others, a step takes 1 to 17 instructions more."""
    return not architecture(device).startswith("gfx")


def backward(
    dys: Sequence[Tensor],
    x: Tensor | None,
    h: Tensor | None,
    layers: Sequence["LowRankLinear"],
    wanted: "Wanted",
    residual: Tensor | None = None,
    config: Config | None = None,
) -> tuple[Tensor, list[Tensor]]:
    """Makes the gradients of two or three layers over one x from those of what each makes, gates aside.

    Args:
        dys: (T, m_i) of each layer.
        x, h: (T, n), and what `forward` made of it; needed if a stage trains.
        wanted: `trains` is of the first layer's stages, then of the second's, ...
        residual: (T, n), added to dx.
        config: tiles of the product; chosen if None.

    Returns:
        dx (T, n), or (0, n) unless wanted; and [dA_s, dB_s, ...] of each stage that trains, the first layer's first.
    """
    dys, tokens = [with_rows(dy) for dy in dys], dys[0].shape[0]
    dx = dys[0].new_empty((tokens if wanted.dx else 0, wanted.columns))
    count = len(layers[0].scales)
    trained = [(i // count, i % count) for i, train in enumerate(wanted.trains) if train]  # (layer, stage)
    das = [torch.zeros_like(layers[i].lora_a[s]) for i, s in trained]
    dbs = [torch.zeros_like(layers[i].lora_b[s]) for i, s in trained]
    if tokens:
        stages = _stages_of_all(layers)
        g = dys[0].new_empty((tokens, stages.width))
        for i in reversed(range(len(layers))):  # attention's gradients of values are the last ones it makes
            own = {s: db for (layer, s), db in zip(trained, dbs, strict=True) if layer == i}
            _make_g(dys[i], h, g, layers, i, own)
        if trained:
            assert x is not None
            partial = launch_reduce(g, with_rows(x))
            for (i, s), da in zip(trained, das, strict=True):
                launch_finish(partial, da, (i * count + s) * da.shape[0])
        if wanted.dx:
            _launch_backward(dys, [layer.weight for layer in layers], g, stages, residual, dx, config)
    return dx, [gradient for pair in zip(das, dbs, strict=True) for gradient in pair]


def _make_g(
    dy: Tensor, h: Tensor | None, g: Tensor, layers: Sequence["LowRankLinear"], i: int, dbs: dict[int, Tensor]
) -> None:
    """Fills layer i's part of g (T, R) of all layers, and the dB of its stages that train."""
    stages, spans = Stages.of(layers[i]), [0, dy.shape[1]]
    place = slice(i * stages.width, (i + 1) * stages.width)
    if dbs:
        assert h is not None
        partial = launch_thin_and_reduce(dy, h[:, place], g[:, place], stages, spans)
        for s, db in dbs.items():
            launch_finish(partial, db, s * db.shape[1], spans, transposed=True)
    else:
        launch_thin(dy, stages.b, g[:, place], stages, spans)


def _launch_backward(
    dys: Sequence[Tensor],
    weights: Sequence[Tensor],
    g: Tensor,
    stages: Stages,
    residual: Tensor | None,
    dx: Tensor,
    config: Config | None,
) -> None:
    (tokens, columns), depths = dx.shape, [dy.shape[1] for dy in dys]
    residual = rows_or_none(residual)
    arguments = dict(
        **numbered("dy", dys), **numbered("w", weights), g=g if stages.width else dx, **stages.pointers(stages.a, dx),
        residual=optional(residual, dx), dx=dx, tokens=tokens, columns=columns, **numbered("depth", depths),
        **numbered("dy{}_t", [dy.stride(0) for dy in dys]), **numbered("w{}_k", [w.stride(0) for w in weights]),
        **numbered("w{}_c", [w.stride(1) for w in weights]), g_t=g.stride(0),
        stage_q=stages.a_q, residual_t=stride_or_zero(residual), **stages.sizes(),
        LAYERS=len(weights), HAS_RESIDUAL=residual is not None, UNROLL=unroll(dx.device, len(weights)),
        PRECISION=precision_of(dx),
    )  # fmt: skip

    def run(config: Config) -> None:
        tiles = triton.cdiv(tokens, config.block_t) * triton.cdiv(columns, config.block_c)
        _backward[(tiles,)](
            **arguments, EVEN_K=divides(config.block_k, depths), GROUP=config.group, **tile_arguments(config)
        )

    shape, dtypes = (tokens, columns, sum(depths)), (dx.dtype, weights[0].dtype)
    run(config or choose("joint", architecture(dx.device), shape, dtypes, run, epilogue=True))


def _stages_of_all(layers: Sequence["LowRankLinear"]) -> Stages:
    """Returns the stages of the first layer, then of the second, ..., of which only A is read."""
    scales = [scale for layer in layers for scale in layer.scales]
    return Stages.pack([a for layer in layers for a in layer.lora_a], [], scales)


def _nth(stages: Sequence[Stages], i: int) -> Stages:
    """Returns layer i's; the first layer's stand for those of a layer that is missing."""
    return stages[i] if i < len(stages) else stages[0]
