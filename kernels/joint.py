"""Several linear layers over one x (formula: `mlfs.ops.joint_linear`), by the kernels of `sliced_linear` and one more.

All adapters' x A_sᵀ, side by side, come from one thin launch, all dA from one reduction over x. `_sum` makes dx: its
loop goes over every layer's dy and W in turn, into one accumulator: no summand is written. Each W is read in place.
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mlfs.kernels.configs import Config, architecture, choose
from mlfs.kernels.sliced_linear import (
    Stages,
    accumulate,
    add_stages,
    launch_back,
    launch_finish,
    launch_product,
    launch_reduce,
    launch_thin,
    precision_of,
    tile_of,
    with_rows,
)


@triton.jit
def _sum(
    d0, d1, d2, w0, w1, w2, g, p0, p1, p2, residual, dx, tokens, columns, m0, m1, m2, d0_t, d1_t, d2_t, w0_k, w0_c,
    w1_k, w1_c, w2_k, w2_c, g_t, p_q, p_c, residual_t,
    LAYERS: tl.constexpr, STAGES: tl.constexpr, RANK: tl.constexpr, HAS_RESIDUAL: tl.constexpr, EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """One BLOCK_T × BLOCK_C tile of dx = Σ_i d_i · W_i + g · P + residual, over the m_i rows of each W_i."""
    tile_t, tile_c = tile_of(tokens, BLOCK_T, GROUP)
    t, c = tile_t * BLOCK_T + tl.arange(0, BLOCK_T), tile_c * BLOCK_C + tl.arange(0, BLOCK_C)
    in_rows, in_columns = t < tokens, c < columns
    t64, c64, k = tl.minimum(t, tokens - 1).to(tl.int64)[:, None], c.to(tl.int64), tl.arange(0, BLOCK_K).to(tl.int64)
    acc = tl.zeros((BLOCK_T, BLOCK_C), tl.float32)
    xs, ws = d0 + t64 * d0_t + k[None, :], w0 + c64[None, :] * w0_c + k[:, None] * w0_k
    acc = accumulate(acc, xs, ws, m0, w0_k, in_columns, False, BLOCK_K, EVEN_K, PRECISION)
    xs, ws = d1 + t64 * d1_t + k[None, :], w1 + c64[None, :] * w1_c + k[:, None] * w1_k
    acc = accumulate(acc, xs, ws, m1, w1_k, in_columns, False, BLOCK_K, EVEN_K, PRECISION)
    if LAYERS > 2:
        xs, ws = d2 + t64 * d2_t + k[None, :], w2 + c64[None, :] * w2_c + k[:, None] * w2_k
        acc = accumulate(acc, xs, ws, m2, w2_k, in_columns, False, BLOCK_K, EVEN_K, PRECISION)
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
    none. gated: the first of two is silu(z) · the second; with `keep` z (T, m), else of size 0. config: tiles of the
    products; chosen if None.
    """
    x, depth = with_rows(x), x.shape[1]
    stages = Stages.pack(lora_a, [], scales)
    h = x.new_empty((x.shape[0], stages.width))
    ys, z = [x.new_empty((x.shape[0], m)) for m in rows], x.new_empty((x.shape[0], rows[0]) if gated and keep else 0)
    if not x.shape[0]:
        return ys, h, z
    launch_thin(x, stages.a, h, depth, stages, [0, depth], reads_spans=False)
    own = _of_each(len(weights), lora_a, lora_b, scales)
    for i in reversed(range(len(weights))):  # the gate is last
        bias = biases[i].contiguous() if biases else None
        options = ("silu_mul", ys[1], None, z if keep else None) if gated and i == 0 else ()
        launch_product(
            x, weights[i].t(), bias, h[:, _place(i, own)], own[i].b, own[i], [0, rows[i]], False, depth, ys[i],
            config, *options,
        )  # fmt: skip
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
        for i, (dy, stages) in enumerate(zip(dys, own, strict=True)):
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


def _launch_sum(
    dys: Sequence[Tensor],
    weights: Sequence[Tensor],
    g: Tensor,
    stages: Stages,
    residual: Tensor | None,
    dx: Tensor,
    config: Config | None,
) -> None:
    def three(values: Sequence[Any]) -> list[Any]:
        return [*values, values[0]][:3]

    sizes = [dy.shape[1] for dy in dys]
    residual = None if residual is None else with_rows(residual)

    def run(config: Config) -> None:
        tiles = triton.cdiv(dx.shape[0], config.block_t) * triton.cdiv(dx.shape[1], config.block_c)
        _sum[(tiles,)](
            *three(dys), *three(weights), g if stages.width else dx, *stages.three(stages.a, dx),
            dx if residual is None else residual, dx, *dx.shape,
            *three(sizes), *three([dy.stride(0) for dy in dys]),
            *(stride for strides in three([w.stride() for w in weights]) for stride in strides),
            g.stride(0), stages.a[0].stride(0) if stages.a else 0, 1, 0 if residual is None else residual.stride(0),
            LAYERS=len(weights), STAGES=stages.count, RANK=max(stages.rank, 1), HAS_RESIDUAL=residual is not None,
            EVEN_K=all(size % config.block_k == 0 for size in sizes),
            PRECISION=precision_of(dx), BLOCK_T=config.block_t, BLOCK_C=config.block_c, BLOCK_K=config.block_k,
            BLOCK_R=stages.block_r, GROUP=config.group, num_warps=config.warps, num_stages=config.stages,
        )  # fmt: skip

    shape, kinds = (*dx.shape, sum(sizes)), (dx.dtype, weights[0].dtype)
    run(config or choose("joint", architecture(dx.device), shape, kinds, run, epilogue=True))
