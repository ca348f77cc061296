"""How many floating-point operations each operator takes, for PyTorch's FlopCounterMode.

Counted as it counts: two for each pair of numbers that a product multiplies and adds, none for what goes number by
number. Formulas see shapes where the operator sees tensors. Masks and labels do not change a count, as they do not in
plain PyTorch.
"""

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch.utils.flop_counter import flop_registry, register_flop_formula

# The operators have to be there before their formulas are.
from mlfs.ops.attention import ragged_attention  # noqa: F401
from mlfs.ops.distill import feature_distance  # noqa: F401
from mlfs.ops.feed_forward import feed_forward  # noqa: F401
from mlfs.ops.grouped_linear import unpack
from mlfs.ops.head_loss import head_loss  # noqa: F401
from mlfs.ops.joint_linear import joint_linear  # noqa: F401
from mlfs.ops.sliced_linear import sliced_linear  # noqa: F401

Shape = Sequence[int]
_OPERATORS = torch.ops.mlfs


def _product(*sizes: int) -> int:
    return 2 * prod(sizes)


def _tokens(shape: Shape) -> int:
    return prod(shape[:-1])


def _forward(tokens: int, columns: int, rows: int, ranks: Sequence[int]) -> int:
    """Of one layer: x Wᵀ, and of each stage x Aᵀ and h Bᵀ."""
    return _product(tokens, columns, rows) + sum(_product(tokens, rank, columns + rows) for rank in ranks)


def _backward(
    tokens: int, columns: int, rows: int, ranks: Sequence[int], trains: Sequence[bool], needs_dx: bool
) -> int:
    """Of one layer: dy W, and of each stage dh = dy B and dh A; dA and dB where it trains."""
    total = needs_dx * _product(tokens, rows, columns)
    for rank, train in zip(ranks, trains, strict=True):
        total += (train or needs_dx) * _product(tokens, rows, rank)
        total += needs_dx * _product(tokens, rank, columns)
        total += train * _product(tokens, rank, columns + rows)
    return total


def _rows_of(spans: Sequence[int], layers: int) -> list[int]:
    """How many rows each layer reads: its spans lie behind those of the layer before."""
    count = len(spans) // layers
    return [sum(spans[i * count + 1 : (i + 1) * count : 2]) for i in range(layers)]


def _of_each(values: Sequence[Any], layers: int) -> list[Sequence[Any]]:
    """Cuts a list over the stages of all layers into one of each layer."""
    count = len(values) // layers
    return [values[i * count : (i + 1) * count] for i in range(layers)]


def _ranks_of(lora_a: Sequence[Shape], layers: int) -> list[list[int]]:
    return [[shape[0] for shape in own] for own in _of_each(lora_a, layers)]


@register_flop_formula(_OPERATORS.sliced_linear)
def _sliced_linear(x, operand, residual, weights, biases, lora_a, lora_b, scales, spans, *_, out_shape=None):
    return _forward(_tokens(x), x[-1], sum(spans[1::2]), [shape[0] for shape in lora_a])


@register_flop_formula(_OPERATORS.sliced_linear_backward)
def _sliced_linear_backward(
    dy, x, h, pre, operand, weights, lora_a, lora_b, scales, spans, trains, needs_dx, columns, *_, out_shape=None
):  # fmt: skip
    return _backward(_tokens(dy), columns, dy[-1], [shape[0] for shape in lora_a], trains, needs_dx)


@register_flop_formula(_OPERATORS.joint_linear)
def _joint_linear(x, weights, biases, lora_a, lora_b, scales, spans, *_, out_shape=None):
    layers = len(weights)
    pairs = zip(_rows_of(spans, layers), _ranks_of(lora_a, layers), strict=True)
    return sum(_forward(_tokens(x), x[-1], rows, ranks) for rows, ranks in pairs)


@register_flop_formula(_OPERATORS.joint_linear_backward)
def _joint_linear_backward(
    dys, x, h, pre, operand, residual, weights, lora_a, lora_b, scales, spans, trains, needs_dx, columns,
    out_shape=None,
):  # fmt: skip
    layers, tokens = len(weights), _tokens(dys[0])
    each = zip(_rows_of(spans, layers), _ranks_of(lora_a, layers), _of_each(trains, layers), strict=True)
    return sum(_backward(tokens, columns, rows, ranks, own, needs_dx) for rows, ranks, own in each)


@register_flop_formula(_OPERATORS.feed_forward)
def _feed_forward(x, residual, weights, biases, lora_a, lora_b, scales, spans, *_, out_shape=None):
    layers, tokens = len(weights), _tokens(x)
    *of_ups, of_down = zip(_rows_of(spans, layers), _ranks_of(lora_a, layers), strict=True)
    total = sum(_forward(tokens, x[-1], rows, ranks) for rows, ranks in of_ups)
    return total + _forward(tokens, of_ups[0][0], *of_down)


@register_flop_formula(_OPERATORS.feed_forward_backward)
def _feed_forward_backward(
    dy, x, h, h_down, activated, pre, operand, residual, weights, lora_a, lora_b, scales, spans, trains, needs_dx,
    columns, *_, out_shape=None,
):  # fmt: skip
    layers, tokens = len(weights), _tokens(dy)
    *of_ups, of_down = zip(_rows_of(spans, layers), _ranks_of(lora_a, layers), _of_each(trains, layers), strict=True)
    goes_on = needs_dx or any(any(trains) for _, _, trains in of_ups)
    total = _backward(tokens, of_ups[0][0], *of_down, needs_dx=goes_on)
    if goes_on:
        total += sum(_backward(tokens, columns, *of_up, needs_dx=needs_dx) for of_up in of_ups)
    return total


@register_flop_formula(_OPERATORS.grouped_sliced_linear)
def _grouped_linear(x, weights, biases, lora_a, lora_b, scales, spans, groups, *_, out_shape=None):
    ranks = [shape[0] for shape in lora_a]
    return sum(_forward(group.tokens, group.n, sum(group.spans[1::2]), ranks) for group in unpack(groups))


@register_flop_formula(_OPERATORS.grouped_sliced_linear_backward)
def _grouped_linear_backward(
    dy, x, h, weights, lora_a, lora_b, scales, spans, groups, trains, needs_dx, out_shape=None
):  # fmt: skip
    ranks = [shape[0] for shape in lora_a]
    return sum(
        _backward(group.tokens, group.n, sum(group.spans[1::2]), ranks, trains, needs_dx) for group in unpack(groups)
    )


@register_flop_formula(_OPERATORS.head_loss)
def _head_loss(x, weight, bias, labels, teacher, alpha, temperature, smoothing, keep, out_shape=None):
    tokens, vocabulary = _tokens(x), weight[0]
    total = (1 + keep) * _product(tokens, vocabulary, x[-1])  # logits, and with `keep` their gradient times W
    return total if teacher is None else total + _product(tokens, vocabulary, teacher[-1])


@register_flop_formula(_OPERATORS.feature_distance)
def _feature_distance(student, teacher, projection, *_, out_shape=None):
    return _product(_tokens(student), projection[0], student[-1] + teacher[-1])


@register_flop_formula(_OPERATORS.feature_distance_backward)
def _feature_distance_backward(
    scale, difference, projection, student, teacher, columns, dtype, needs_dx, out_shape=None
):  # fmt: skip
    tokens, projected = difference
    total = needs_dx * _product(tokens, projected, columns)
    if student is not None:
        total += _product(tokens, projected, student[-1] + teacher[-1])
    return total


@register_flop_formula(_OPERATORS.ragged_attention)
def _attention(q, k, *_, out_shape=None):
    rows, tokens, heads, dim = q
    return 2 * _product(rows, heads, tokens, k[1], dim)  # q kᵀ, and its softmax times v


@register_flop_formula(_OPERATORS.ragged_attention_backward)
def _attention_backward(d_o, q, k, *_, out_shape=None):
    rows, tokens, heads, dim = q
    return 5 * _product(rows, heads, tokens, k[1], dim)  # q kᵀ again, and the products that make dv, dp, dq and dk


COUNTED = [operator for operator in flop_registry if str(operator).startswith("mlfs.")]
