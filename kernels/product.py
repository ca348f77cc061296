"""Sliced product with low-rank stages (formula: `mlfs.ops.sliced_linear`) for GPUs.

Forward, two launches: `reductions._thin` makes h, `_forward` makes [x | h] · [W | B]ᵀ: the adapters are one more step
of the loop over W's columns, into the same accumulator, so the loop itself is that of a plain product. Backward: g and
dB come from one pass over dy, dA from one over x (see `reductions`); `_backward` makes dx from [dy | g] · [W | A], W
read the other way. `_backward_through_activation` takes dx on through what made x, while it is in registers, and makes
dA beside it. W is only ever read.

Spans of W's rows are the columns of the forward product and the depth of the backward ones. Names: see `tiles`.
"""

from typing import TYPE_CHECKING, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from mlfs.kernels.arguments import (
    Arguments,
    Product,
    Stages,
    columns_or_none,
    epilogue_parts,
    in_launches,
    optional,
    pairs_of,
    rows_or_none,
    span_arguments,
    stride_or_zero,
    with_rows,
)
from mlfs.kernels.configs import Config, gradient_part, unroll
from mlfs.kernels.epilogue import activation_backward_kernel, activation_gradient, apply_activation
from mlfs.kernels.reductions import Gradients, launch_thin, launch_thin_and_reduce
from mlfs.kernels.tiles import accumulate, add_stages, dot, nth, readable, rows_of, span_of, tile_of

if TYPE_CHECKING:
    from mlfs.ops.layer import Activated, Epilogue, LowRankLinear, Wanted


@triton.jit
def _forward(
    x, w, bias, h, stage0, stage1, stage2, operand, residual, y, pre, tokens, depth, x_t, h_t, w_k, w_c, stage_c,
    operand_t, residual_t, y_t, start0, length0, start1, length1, start2, length2,
    STAGES: tl.constexpr, RANK: tl.constexpr, SPANS: tl.constexpr, UNIT_K: tl.constexpr, EVEN_K: tl.constexpr,
    HAS_BIAS: tl.constexpr, ACTIVATION: tl.constexpr, KEEP_PRE: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """One BLOCK_T × BLOCK_C tile of y = act(x · Wᵀ + h · Bᵀ + bias) [· operand] + residual, over spans of W's rows;
    with KEEP_PRE what goes into act is written, too."""
    tile_t, tile_c = tile_of(tokens, BLOCK_T, GROUP)
    t = tile_t * BLOCK_T + tl.arange(0, BLOCK_T)
    k = tl.arange(0, BLOCK_K).to(tl.int64)
    in_rows = t < tokens
    first, length, offset, tile = span_of(tile_c, start0, length0, start1, length1, start2, length2, SPANS, BLOCK_C)
    c = tile * BLOCK_C + tl.arange(0, BLOCK_C)  # within the span
    in_columns = c < length
    rows = (first + c).to(tl.int64)  # of W, bias and B
    xs = rows_of(x, t, tokens, x_t, k)
    read, mask = readable(c, length, UNIT_K)
    ws = w + (first + read).to(tl.int64)[None, :] * w_c + k[:, None] * w_k
    acc = tl.zeros((BLOCK_T, BLOCK_C), tl.float32)
    acc = accumulate(acc, xs, ws, depth, w_k, mask, UNIT_K, BLOCK_K, EVEN_K, PRECISION)
    t64, column, mask = t.to(tl.int64)[:, None], (offset + c)[None, :], in_rows[:, None] & in_columns[None, :]
    if HAS_RESIDUAL:  # while the stages are multiplied; later, a tile of 64 × 64 spills on sm100
        more = tl.load(residual + t64 * residual_t + column, mask=mask, other=0.0)
    acc = add_stages(
        acc, h, stage0, stage1, stage2, t, in_rows, rows, in_columns, h_t, 1, stage_c, STAGES, RANK, BLOCK_R, PRECISION
    )

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
def _sum_over_spans(
    dy, w, t, tokens, c, columns, dy_t, w_k, w_c, start0, length0, start1, length1, start2, length2,
    SPANS: tl.constexpr, UNROLL: tl.constexpr, UNIT_K: tl.constexpr, EVEN_K: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Σ_k dy[t, k] · W[row(k), c] over spans of W's rows, which lie side by side in dy."""
    k = tl.arange(0, BLOCK_K).to(tl.int64)
    ds = rows_of(dy, t, tokens, dy_t, k)
    read, mask = readable(c, columns, UNIT_K)
    ws = w + read.to(tl.int64)[None, :] * w_c
    acc = tl.zeros((BLOCK_T, BLOCK_C), tl.float32)
    for i in tl.range(SPANS, loop_unroll_factor=UNROLL):
        ks = ws + (k + nth(i, start0, start1, start2, SPANS))[:, None] * w_k
        length = nth(i, length0, length1, length2, SPANS)
        acc = accumulate(acc, ds, ks, length, w_k, mask, UNIT_K, BLOCK_K, EVEN_K, PRECISION)
        ds += length
    return acc


@triton.jit
def _backward(
    dy, w, g, stage0, stage1, stage2, residual, dx, tokens, columns, dy_t, g_t, w_k, w_c, stage_q, residual_t,
    start0, length0, start1, length1, start2, length2,
    STAGES: tl.constexpr, RANK: tl.constexpr, SPANS: tl.constexpr, UNROLL: tl.constexpr, UNIT_K: tl.constexpr,
    EVEN_K: tl.constexpr, HAS_RESIDUAL: tl.constexpr, PRECISION: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """One BLOCK_T × BLOCK_C tile of dx = dy · W + g · A + residual."""
    tile_t, tile_c = tile_of(tokens, BLOCK_T, GROUP)
    t = tile_t * BLOCK_T + tl.arange(0, BLOCK_T)
    c = tile_c * BLOCK_C + tl.arange(0, BLOCK_C)
    in_rows, in_columns = t < tokens, c < columns
    acc = _sum_over_spans(
        dy, w, t, tokens, c, columns, dy_t, w_k, w_c, start0, length0, start1, length1, start2, length2,
        SPANS, UNROLL, UNIT_K, EVEN_K, PRECISION, BLOCK_T, BLOCK_C, BLOCK_K,
    )  # fmt: skip
    t64, mask = t.to(tl.int64)[:, None], in_rows[:, None] & in_columns[None, :]
    if HAS_RESIDUAL:  # while the stages are multiplied; later, a tile of 64 × 64 spills on sm100
        more = tl.load(residual + t64 * residual_t + c[None, :], mask=mask, other=0.0)
    acc = add_stages(
        acc, g, stage0, stage1, stage2, t, in_rows, c.to(tl.int64), in_columns, g_t, stage_q, 1, STAGES, RANK, BLOCK_R,
        PRECISION,
    )  # fmt: skip
    if HAS_RESIDUAL:
        acc += more.to(tl.float32)
    tl.store(dx + t64 * columns + c[None, :], acc.to(dx.dtype.element_ty), mask=mask)


@triton.jit
def _backward_through_activation(
    dy, w, g, stage0, stage1, stage2, pre, operand, d_pre, d_operand, partial, tokens, columns, dy_t, g_t, w_k, w_c,
    stage_q, operand_t, first_rank, start0, length0, start1, length1, start2, length2,
    STAGES: tl.constexpr, RANK: tl.constexpr, SPANS: tl.constexpr, UNROLL: tl.constexpr, UNIT_K: tl.constexpr,
    EVEN_K: tl.constexpr, ACTIVATION: tl.constexpr, PART: tl.constexpr, RANKS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """`_backward` where x = act(pre) [· operand]: one tile of the gradients of pre and operand, and sums for dA. All
    but operand are contiguous."""
    tile_t, tile_c = tile_of(tokens, BLOCK_T, GROUP)
    t = tile_t * BLOCK_T + tl.arange(0, BLOCK_T)
    c = tile_c * BLOCK_C + tl.arange(0, BLOCK_C)
    in_rows, in_columns = t < tokens, c < columns
    acc = _sum_over_spans(
        dy, w, t, tokens, c, columns, dy_t, w_k, w_c, start0, length0, start1, length1, start2, length2,
        SPANS, UNROLL, UNIT_K, EVEN_K, PRECISION, BLOCK_T, BLOCK_C, BLOCK_K,
    )  # fmt: skip
    acc = add_stages(
        acc, g, stage0, stage1, stage2, t, in_rows, c.to(tl.int64), in_columns, g_t, stage_q, 1, STAGES, RANK, BLOCK_R,
        PRECISION,
    )  # fmt: skip
    _store_through_activation(
        acc, g, pre, operand, d_pre, d_operand, partial, tile_t, t, in_rows, tile_c * BLOCK_C, columns, g_t, operand_t,
        first_rank, ACTIVATION, RANKS, PRECISION, BLOCK_T, BLOCK_C, PART, BLOCK_R,
    )  # fmt: skip


@triton.jit
def _store_through_activation(
    acc, g, pre, operand, d_pre, d_operand, partial, tile_t, t, in_rows, first, columns, g_t, operand_t, first_rank,
    ACTIVATION: tl.constexpr, RANKS: tl.constexpr, PRECISION: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr, PART: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """From acc, the gradient of x = act(pre) [· operand] in BLOCK_C columns from `first` on: those of pre and operand;
    and partial[tile_t, q, c] = Σ_t g[t, first_rank + q] · x[t, c] for RANKS ranks q, with x made again."""
    if BLOCK_C > PART:  # with all that it meets, the tile does not fit into registers
        left, right = tl.split(tl.permute(tl.reshape(acc, (BLOCK_T, 2, BLOCK_C // 2)), (0, 2, 1)))
        _store_through_activation(
            left, g, pre, operand, d_pre, d_operand, partial, tile_t, t, in_rows, first, columns, g_t, operand_t,
            first_rank, ACTIVATION, RANKS, PRECISION, BLOCK_T, BLOCK_C // 2, PART, BLOCK_R,
        )  # fmt: skip
        _store_through_activation(
            right, g, pre, operand, d_pre, d_operand, partial, tile_t, t, in_rows, first + BLOCK_C // 2, columns, g_t,
            operand_t, first_rank, ACTIVATION, RANKS, PRECISION, BLOCK_T, BLOCK_C // 2, PART, BLOCK_R,
        )  # fmt: skip
    else:
        t64, c = t.to(tl.int64), first + tl.arange(0, BLOCK_C)
        mask, out = in_rows[:, None] & (c < columns)[None, :], t64[:, None] * columns + c[None, :]
        z = tl.load(pre + out, mask=mask, other=0.0).to(tl.float32)
        other = z
        if ACTIVATION == "silu_mul":
            other = tl.load(operand + t64[:, None] * operand_t + c[None, :], mask=mask, other=0.0).to(tl.float32)
        dz, d_other = activation_gradient(acc, z, other, ACTIVATION)
        tl.store(d_pre + out, dz.to(d_pre.dtype.element_ty), mask=mask)
        if ACTIVATION == "silu_mul":
            tl.store(d_operand + out, d_other.to(d_operand.dtype.element_ty), mask=mask)
        x = apply_activation(z, other, ACTIVATION).to(pre.dtype.element_ty)
        for r in tl.static_range(0, RANKS, BLOCK_R):
            q = r + tl.arange(0, BLOCK_R)
            in_ranks = (q < RANKS)[:, None]
            gs = g + t64[None, :] * g_t + (first_rank + q)[:, None]
            gs = tl.load(gs, mask=in_ranks & in_rows[None, :], other=0.0)
            sums = dot(gs, x, tl.zeros((BLOCK_R, BLOCK_C), tl.float32), PRECISION)
            place = partial + (tile_t.to(tl.int64) * RANKS + q)[:, None] * columns + c[None, :]
            tl.store(place, sums, mask=in_ranks & (c < columns)[None, :])


# ---- launchers ------------------------------------------------------------------------------------------------------


def forward(
    x: Tensor,
    layer: "LowRankLinear",
    epilogue: "Epilogue | None" = None,
    keep_pre: bool = False,
    config: Config | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Applies a layer to x (T, n): the formula of `mlfs.ops.sliced_linear`.

    Args:
        epilogue: what is done to the product; operand and residual are (T, m). None: nothing.
        keep_pre: whether what goes into the activation is returned.
        config: tiles of the product; chosen if None.

    Returns:
        y (T, m), of x's type or, with a residual, of the wider of theirs; h (T, R), the stages' c_s · x A_sᵀ side by
        side; and what goes into the activation (T, m), of size 0 unless `keep_pre`.
    """
    activation, operand, residual = epilogue_parts(epilogue)
    (tokens, depth), m = x.shape, layer.rows
    x, stages, weight = with_rows(x), Stages.of(layer), layer.weight
    bias = None if layer.bias is None else layer.bias.contiguous()
    y = x.new_empty((tokens, m), dtype=x.dtype if residual is None else torch.result_type(x, residual))
    pre = x.new_empty((tokens, m) if keep_pre else 0)
    h = x.new_empty((tokens, stages.width))
    if y.numel() == 0:
        return y, h, pre
    launch_thin(x, stages.a, h, stages)
    for spans, columns in in_launches(layer.spans):
        own_operand, own_residual = columns_or_none(operand, columns), columns_or_none(residual, columns)
        arguments = dict(
            bias=optional(bias, x), h=h if stages.width else x, **stages.pointers(stages.b, x),
            operand=optional(own_operand, x), residual=optional(own_residual, x), y=y[:, columns],
            pre=pre[:, columns] if keep_pre else y,
            tokens=tokens, depth=depth, x_t=x.stride(0), h_t=h.stride(0), w_k=weight.stride(1), w_c=weight.stride(0),
            stage_c=stages.b_c, operand_t=stride_or_zero(operand),
            residual_t=stride_or_zero(residual), y_t=y.stride(0),
            **span_arguments(spans), **stages.sizes(), UNIT_K=weight.stride(1) == 1, HAS_BIAS=bias is not None,
            ACTIVATION=activation, KEEP_PRE=keep_pre, HAS_RESIDUAL=residual is not None,
        )  # fmt: skip
        product = Product(_forward, x, weight, arguments, spans[1::2], [depth])
        does_more = activation != "none" or residual is not None or stages.count > 1
        product.launch(config or product.choose("product", epilogue=does_more))
    return y, h, pre


def backward(
    dz: Tensor,
    x: Tensor | None,
    h: Tensor | None,
    layer: "LowRankLinear",
    wanted: "Wanted",
    residual: Tensor | None = None,
    config: Config | None = None,
) -> tuple[Tensor, list[Tensor]]:
    """Makes the gradients of a layer's product from that of its result, its epilogue aside.

    Args:
        dz: (T, m), the gradient of what goes into the epilogue.
        x, h: (T, n), and what `forward` made of it; needed if a stage trains.
        residual: (T, n), added to dx.
        config: tiles of the product; chosen if None.

    Returns:
        dx (T, n), or (0, n) unless wanted; and [dA_s, dB_s, ...] of each stage that trains.
    """
    tokens, n = dz.shape[0], wanted.columns
    dx, gradients = dz.new_empty((tokens if wanted.dx else 0, n)), Gradients(layer, wanted.trains)
    if dz.numel() == 0 or n == 0:
        dx.zero_() if residual is None or not wanted.dx else dx.copy_(residual)
        return dx, gradients.in_order()
    dz, residual, reads = with_rows(dz), rows_or_none(residual), _read(layer, n)
    g = _make_g(dz, h, reads, gradients, wanted.dx)
    if gradients:
        assert x is not None
        gradients.reduce_a(g, x)
    if wanted.dx:
        arguments = reads.arguments(dz, g) | dict(
            residual=optional(residual, dz), dx=dx, columns=n, residual_t=stride_or_zero(residual),
            HAS_RESIDUAL=residual is not None,
        )  # fmt: skip
        product = Product(_backward, dz, reads.weight, arguments, [n], reads.spans[1::2])
        does_more = residual is not None or reads.stages.count > 1
        product.launch(config or product.choose("product", epilogue=does_more))
    return dx, gradients.in_order()


def backward_through_activation(
    dz: Tensor,
    x: Tensor | None,
    h: Tensor | None,
    layer: "LowRankLinear",
    wanted: "Wanted",
    activated: "Activated",
    config: Config | None = None,
) -> tuple[Tensor, Tensor | None, list[Tensor]]:
    """Makes the gradients of a layer's product, and takes that of x = act(pre) [· operand] on to pre and operand.

    Args:
        dz, h, config: as for `backward`.
        x: (T, n), for dA; None: it is made again from `activated`, beside d_pre.
        wanted: its `dx` says whether d_pre and d_operand are made; where x is made again they are in any case.

    Returns:
        d_pre (T, n), or (0, n) if it is not made; d_operand, the same, or None without an operand; and
        [dA_s, dB_s, ...] of each stage that trains.
    """
    tokens, n, gradients = dz.shape[0], wanted.columns, Gradients(layer, wanted.trains)
    makes_dx = wanted.dx or x is None
    d_pre = dz.new_empty((tokens if makes_dx else 0, n))
    d_operand = None if activated.operand is None else torch.empty_like(d_pre)
    if dz.numel() == 0 or n == 0:
        return d_pre.zero_(), None if d_operand is None else d_operand.zero_(), gradients.in_order()
    dz, reads = with_rows(dz), _read(layer, n)
    g = _make_g(dz, h, reads, gradients, makes_dx)
    if gradients and x is not None:
        gradients.reduce_a(g, x)
    if makes_dx:
        ranks = gradients.ranks if x is None else slice(0, 0)
        operand, pre = rows_or_none(activated.operand), activated.pre.contiguous()
        arguments = reads.arguments(dz, g) | dict(
            pre=pre, operand=optional(operand, dz), d_pre=d_pre, d_operand=optional(d_operand, d_pre), columns=n,
            operand_t=stride_or_zero(operand), first_rank=ranks.start, ACTIVATION=activated.activation,
            PART=gradient_part(dz.device), RANKS=ranks.stop - ranks.start,
        )  # fmt: skip
        product = Product(_backward_through_activation, dz, reads.weight, arguments, [n], reads.spans[1::2])
        partial = _launch_with_sums(product, tokens, config)
        if x is None:
            gradients.finish_a(partial)
    return d_pre, d_operand, gradients.in_order()


def _launch_with_sums(product: Product, tokens: int, config: Config | None) -> Tensor:
    """Launches `_backward_through_activation`; returns the sums for dA (parts, ranks, columns) over a tile of tokens
    each, of which there are none if x is not made again."""
    ranks, columns, d_pre = (product.arguments[name] for name in ("RANKS", "columns", "d_pre"))
    partial = d_pre

    def run(config: Config) -> None:
        nonlocal partial
        if ranks:
            parts = triton.cdiv(tokens, config.block_t)
            partial = torch.empty((parts, ranks, columns), dtype=torch.float32, device=d_pre.device)
        product.launch(config, partial=partial)

    run(config or product.choose("product", run, epilogue=True, gradient=True))
    return partial


def activation_backward(
    dy: Tensor, pre: Tensor, operand: Tensor | None, activation: str
) -> tuple[Tensor, Tensor | None]:
    """Makes the gradients of pre and of operand, or None, from that of y = act(pre) [· operand], all (T, m)."""
    dy, pre, operand = with_rows(dy), with_rows(pre), rows_or_none(operand)
    dz = torch.empty_like(dy, memory_format=torch.contiguous_format)
    d_operand = None if operand is None else torch.empty_like(dz)
    rows, columns = dy.shape
    if dy.numel():
        activation_backward_kernel[(rows,)](
            dy, pre, optional(operand, pre), dz, optional(d_operand, dz), rows=rows, columns=columns,
            dy_t=dy.stride(0), pre_t=pre.stride(0), operand_t=stride_or_zero(operand),
            ACTIVATION=activation, BLOCK=min(2048, triton.next_power_of_2(columns)),
        )  # fmt: skip
    return dz, d_operand


class _Reads(NamedTuple):
    """What a backward product reads of a layer.

    Attributes:
        weight, stages, spans: at most three spans of the rows of W and B.
        launches: for each of the layer's own spans of rows, three at a time, which columns of dz are theirs.
    """

    weight: Tensor
    stages: Stages
    spans: list[int]
    launches: list[tuple[list[int], slice]]

    def arguments(self, dz: Tensor, g: Tensor) -> Arguments:
        """Returns the arguments of a kernel that multiplies [dz | g] with [W | A]."""
        stages, weight = self.stages, self.weight
        return dict(
            g=g if stages.width else dz, **stages.pointers(stages.a, dz), tokens=dz.shape[0], dy_t=dz.stride(0),
            g_t=g.stride(0), w_k=weight.stride(0), w_c=weight.stride(1),
            stage_q=stages.a_q, **span_arguments(self.spans), **stages.sizes(),
            UNROLL=unroll(dz.device, len(self.spans) // 2), UNIT_K=weight.stride(0) == 1,
        )  # fmt: skip


def _read(layer: "LowRankLinear", columns: int) -> _Reads:
    """Returns what the backward product over n `columns` of W reads."""
    launches, stages = in_launches(layer.spans), Stages.of(layer)
    if len(launches) == 1:
        return _Reads(layer.weight, stages, launches[0][0], launches)
    # so many spans do not fit one launch: they are copied, and read as one matrix
    parts = [torch.arange(start, start + length, device=layer.weight.device) for start, length in pairs_of(layer.spans)]
    rows = torch.cat(parts)
    weight = layer.weight[:, :columns].index_select(0, rows)
    return _Reads(weight, stages.with_rows(rows), [0, len(rows)], launches)


def _make_g(dz: Tensor, h: Tensor | None, reads: _Reads, gradients: Gradients, needs_g: bool) -> Tensor:
    """Returns g (T, R), the c_s · dz B_s side by side, and makes dB where a stage trains."""
    g = dz.new_empty((dz.shape[0], reads.stages.width))
    if gradients:
        assert h is not None
        partial = launch_thin_and_reduce(dz, h[:, gradients.ranks], g, reads.stages, reads.spans)
        gradients.finish_b(partial, reads.launches)
    elif needs_g:
        launch_thin(dz, reads.stages.b, g, reads.stages, reads.spans)
    return g
