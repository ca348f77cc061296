"""Several sliced linear layers over one W: each group of tokens runs at a size of its own.

    x_j            = x[T_j, :n_j]
    y[T_j, rows_j] = x_j · W[rows_j, :n_j]ᵀ + b[rows_j] + Σ_s c_s · (x_j · A_s[:, :n_j]ᵀ) · B_s[rows_j]ᵀ

Shapes: x (T, N) and y (T, M) at the full width of W (M, N); T_j are consecutive tokens, rows_j spans of W's rows. Off
its spans, and for tokens in no group, y is zero; off its columns and spans, what x and dy hold is not read. The rest is
as in `mlfs.ops.sliced_linear`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mlfs.errors import MLFSError
from mlfs.ops.backend import backend_of, in_autocast_type
from mlfs.ops.layer import LowRankLinear, Wanted
from mlfs.ops.sliced_linear import linear_backward, of_each_stage, sliced_linear_reference

__all__ = ["Group", "grouped_sliced_linear", "grouped_sliced_linear_reference"]
_SPANS = 3  # a group has at most
_FIELDS = 3 + 2 * _SPANS


@dataclass(frozen=True)
class Group:
    """`tokens` consecutive rows of x from `first` on that read `n` columns and write `spans` (start, length, ...)."""

    first: int
    tokens: int
    n: int
    spans: tuple[int, ...]

    @property
    def rows(self) -> slice:
        """Its tokens."""
        return slice(self.first, self.first + self.tokens)

    @property
    def pieces(self) -> list[tuple[slice, slice]]:
        """Its spans that are not empty: (columns of y, their place side by side)."""
        found, place = [], 0
        for start, length in zip(self.spans[::2], self.spans[1::2], strict=True):
            if length:
                found.append((slice(start, start + length), slice(place, place + length)))
            place += length
        return found


def grouped_sliced_linear_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Sequence[Tensor],
    lora_b: Sequence[Tensor],
    scales: Sequence[float],
    groups: Sequence[Group],
) -> Tensor:
    """The formula in plain, differentiable PyTorch: one sliced product after the other."""
    y = x.new_zeros(x.shape[0], weight.shape[0])
    for group in groups:
        if group.pieces:
            part = x[group.rows, : group.n]
            z = sliced_linear_reference(part, weight, bias, lora_a, lora_b, scales, group.spans)
            for columns, place in group.pieces:
                y[group.rows, columns] = z[:, place]
    return y


def grouped_sliced_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Sequence[Tensor],
    lora_b: Sequence[Tensor],
    scales: Sequence[float],
    groups: Sequence[Group],
) -> Tensor:
    """The formula above, with W and b frozen.

    Args:
        x: (T, N), floating point; under autocast cast to its type.
        weight, bias, lora_a, lora_b, scales: as in `sliced_linear`.
        groups: sizes and spans of consecutive tokens; at most three spans each.

    Raises:
        MLFSError: groups that overlap, or lie outside x or W.
    """
    tokens, (m, n) = x.shape[0], weight.shape
    end = 0
    for group in groups:
        spans = list(zip(group.spans[::2], group.spans[1::2], strict=True))
        fits = end <= group.first and group.first + group.tokens <= tokens and 0 <= group.n <= n and group.tokens >= 0
        if not fits or len(spans) > _SPANS or any(a < 0 or k < 0 or a + k > m for a, k in spans):
            raise MLFSError(
                f"{group}: expected tokens after {end} and within {tokens}, n of at most {n}, and up to {_SPANS} "
                f"spans of {m} rows"
            )
        end = group.first + group.tokens
    x = in_autocast_type(x)
    packed = [
        number for g in groups for number in (g.first, g.tokens, g.n, *g.spans, *[0] * (2 * _SPANS - len(g.spans)))
    ]
    return _grouped_linear(x, weight, bias, list(lora_a), list(lora_b), list(scales), packed)[0]


def _unpack(numbers: list[int]) -> tuple[Group, ...]:
    """The groups that have tokens and spans; what a group without spans holds may be anything."""
    rows = (numbers[i : i + _FIELDS] for i in range(0, len(numbers), _FIELDS))
    return tuple(
        Group(first, tokens, n, tuple(spans)) for first, tokens, n, *spans in rows if tokens and any(spans[1::2])
    )


@torch.library.custom_op("mlfs::grouped_sliced_linear", mutates_args=())
def _grouped_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: list[Tensor],
    lora_b: list[Tensor],
    scales: list[float],
    groups: list[int],
) -> tuple[Tensor, Tensor]:
    """(y, h): h (T, Σ r_s) are the stages' c_s · x A_sᵀ side by side, kept for the backward pass."""
    some = _unpack(groups)
    if backend_of(x) == "triton":
        from mlfs.kernels import grouped as kernels

        return kernels.forward(x, LowRankLinear(weight, bias, lora_a, lora_b, scales, ()), some)
    ranks = [a.shape[0] for a in lora_a]
    y, h = x.new_zeros(x.shape[0], weight.shape[0]), x.new_zeros(x.shape[0], sum(ranks))
    for group in some:
        part, mine = x[group.rows, : group.n], h[group.rows].split(ranks, 1)
        for a, c, out in zip(lora_a, scales, mine, strict=True):
            out.copy_(part @ a[:, : group.n].to(x.dtype).t()).mul_(c)
        for rows, _ in group.pieces:
            z = torch.nn.functional.linear(
                part, weight[rows, : group.n].to(x.dtype), None if bias is None else bias[rows].to(x.dtype)
            )
            for b, out in zip(lora_b, mine, strict=True):
                z.addmm_(out, b[rows].to(x.dtype).t())
            y[group.rows, rows] = z
    return y, h


@_grouped_linear.register_fake
def _(x, weight, bias, lora_a, lora_b, scales, groups):
    return x.new_empty(x.shape[0], weight.shape[0]), x.new_empty(x.shape[0], sum(a.shape[0] for a in lora_a))


@torch.library.custom_op("mlfs::grouped_sliced_linear_backward", mutates_args=())
def _grouped_linear_backward(
    dy: Tensor,
    x: Tensor | None,
    h: Tensor | None,
    weight: Tensor,
    lora_a: list[Tensor],
    lora_b: list[Tensor],
    scales: list[float],
    groups: list[int],
    trains: list[bool],
    needs_dx: bool,
) -> list[Tensor]:
    """[dx (empty unless needed), dA_s and dB_s of each stage s that trains]."""
    some = _unpack(groups)
    if backend_of(dy) == "triton":
        from mlfs.kernels import grouped as kernels

        layer = LowRankLinear(weight, None, lora_a, lora_b, scales, ())
        dx, gradients = kernels.backward(dy, x, h, layer, some, Wanted(trains, needs_dx, weight.shape[1]))
        return [dx, *gradients]
    dx = dy.new_zeros((dy.shape[0] if needs_dx else 0, weight.shape[1]))
    total = [torch.zeros_like(t) for s, train in enumerate(trains) if train for t in (lora_a[s], lora_b[s])]
    for group in some:
        if not group.pieces:
            continue
        dz = torch.cat([dy[group.rows, rows] for rows, _ in group.pieces], 1)
        spans = [number for rows, _ in group.pieces for number in (rows.start, rows.stop - rows.start)]
        part = None if x is None else x[group.rows, : group.n]
        mine = None if h is None else h[group.rows]
        found = linear_backward(dz, part, mine, weight, lora_a, lora_b, scales, spans, trains, needs_dx, group.n)
        if needs_dx:
            dx[group.rows, : group.n] = found[0]
        for sum_, more in zip(total, found[1:], strict=True):
            sum_ += more
    return [dx, *total]


@_grouped_linear_backward.register_fake
def _(dy, x, h, weight, lora_a, lora_b, scales, groups, trains, needs_dx):
    stages = [(a, b) for a, b, train in zip(lora_a, lora_b, trains, strict=True) if train]
    dx = dy.new_empty(dy.shape[0] if needs_dx else 0, weight.shape[1])
    return [dx, *(torch.empty_like(t) for pair in stages for t in pair)]


def _setup_context(ctx, inputs, output) -> None:
    x, weight, _, lora_a, lora_b, scales, groups = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.trains = [a.requires_grad or b.requires_grad for a, b in zip(lora_a, lora_b, strict=True)]
    ctx.scales, ctx.groups, ctx.stages = scales, groups, len(lora_a)
    ctx.save_for_backward(*([x, output[1]] if any(ctx.trains) else []), weight, *lora_a, *lora_b)


def _backward(ctx, dy, dh):
    numbers = None if ctx.scales else []  # an empty list of numbers looks like one of tensors to torch.library
    indices = None if ctx.groups else []
    if dy is None:
        return None, None, None, [None] * ctx.stages, [None] * ctx.stages, numbers, indices
    saved = list(ctx.saved_tensors)
    x, h = (saved.pop(0), saved.pop(0)) if any(ctx.trains) else (None, None)
    weight, lora_a, lora_b = saved[0], saved[1 : 1 + ctx.stages], saved[1 + ctx.stages :]
    needs_dx = ctx.needs_input_grad[0]
    out = _grouped_linear_backward(dy, x, h, weight, lora_a, lora_b, ctx.scales, ctx.groups, ctx.trains, needs_dx)
    da, db = of_each_stage(ctx.trains, out[1:])
    return out[0] if needs_dx else None, None, None, da, db, numbers, indices


_grouped_linear.register_autograd(_backward, setup_context=_setup_context)
