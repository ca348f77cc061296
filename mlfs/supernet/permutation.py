"""Permutations of heads, feed-forward units and the residual stream, which leave the full model's function as it is.

A permutation holds, for each axis that is reordered, the old index of every unit at its new place. A unit of heads is a
whole group: the query heads that share one key-value head. Layers have an order too, the ones that matter most first,
by which depths are chosen; but they stay where they are, so that their indices are always the model's own.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from mlfs.elastic.base import Elastic
from mlfs.elastic.embedding import ElasticEmbedding
from mlfs.elastic.linear import ElasticLinear
from mlfs.errors import MLFSError
from mlfs.space.dimensions import AxisSize, Dimensions

UnitAxis = tuple[str, int | None]  # ("hidden", None), ("heads", layer), ("ffn", layer) or LAYERS
Permutation = dict[UnitAxis, list[int]]
LAYERS: UnitAxis = ("layers", None)


def permutation_of(scores: Mapping[UnitAxis, Tensor]) -> Permutation:
    """Ranks the units of each axis by score, highest first; units of equal score keep their order.

    Args:
        scores: for each axis one score per unit, (units,).
    """
    return {axis: torch.argsort(values, descending=True, stable=True).tolist() for axis, values in scores.items()}


@torch.no_grad()
def permute(model: nn.Module, permutation: Permutation, dims: Dimensions) -> None:
    """Reorders all weights, adapters and heads of an elastic model in place.

    Args:
        permutation: for each axis that is reordered, the old index of each unit at its new place.
        dims: the full sizes of `model`.
    """
    done = set()  # a tied matrix, which two modules hold, is reordered once along each dim

    def reorder(parameter: Tensor | None, dim: int, index: Tensor) -> None:
        if parameter is not None and (id(parameter), dim) not in done:
            done.add((id(parameter), dim))
            parameter.copy_(parameter.index_select(dim, index.to(parameter.device)))

    for module in model.modules():
        if not isinstance(module, Elastic):
            continue
        axes = module.axes()
        if isinstance(module, ElasticLinear):
            # A tied output head shares the embedding's matrix: (out, in) there, (in, out) in a Conv1D.
            rows = torch.arange(module.out_features)
            for part in axes.outputs:
                order = permutation.get(unit_axis(part.size))
                rows[part.start : part.stop] = part.start + _indices(order, part.size, part.stop - part.start, dims)
            reorder(module.own_weight, int(module.transposed), rows)
            reorder(module.own_bias, 0, rows)
            for b in module.lora_B:
                reorder(b, 0, rows)
            if axes.input:
                columns = _indices(permutation.get(unit_axis(axes.input)), axes.input, module.in_features, dims)
                reorder(module.own_weight, int(not module.transposed), columns)
                for a in module.lora_A:
                    reorder(a, 1, columns)
        else:
            (part,) = axes.outputs
            columns = _indices(permutation.get(unit_axis(part.size)), part.size, module.own_weight.shape[-1], dims)
            reorder(module.own_weight, int(isinstance(module, ElasticEmbedding)), columns)
            reorder(module.own_bias, 0, columns)


def compose(first: Permutation, then: Permutation) -> Permutation:
    """Makes the permutation that does `first`, then `then`."""
    composed = dict(first)
    for axis, order in then.items():
        if axis in first and axis != LAYERS:
            composed[axis] = [first[axis][index] for index in order]
        else:
            composed[axis] = order
    return composed


def difference(have: Permutation, want: Permutation) -> Permutation:
    """Makes the permutation that turns units ordered by `have` into units ordered by `want`."""
    result: Permutation = {}
    for axis in have.keys() | want.keys():
        if axis == LAYERS:
            continue
        length = len(have.get(axis) or want[axis])
        unchanged = list(range(length))
        place = {unit: index for index, unit in enumerate(have.get(axis, unchanged))}
        result[axis] = [place[unit] for unit in want.get(axis, unchanged)]
    if LAYERS in want:
        result[LAYERS] = want[LAYERS]
    return result


def check_permutation(permutation: Permutation, dims: Dimensions) -> None:
    """Raises MLFSError unless every entry is a permutation of an axis of the model."""
    lengths = {"hidden": dims.hidden, "heads": dims.heads // dims.group, "ffn": dims.ffn, "layers": dims.layers}
    for (axis, layer), order in permutation.items():
        of_all = axis in ("hidden", "layers")
        known = axis in lengths and (layer is None) == of_all and (layer is None or layer < dims.layers)
        if not known or sorted(order) != list(range(lengths[axis])):
            raise MLFSError(f"the permutation of {axis} (layer {layer}) is not one of this model's")


def unit_axis(size: AxisSize) -> UnitAxis:
    """Names the axis whose units move; key-value heads move with their query heads."""
    return ("heads" if size.axis == "kv_heads" else size.axis, size.layer)


def numbers_per_unit(size: AxisSize, dims: Dimensions) -> int:
    """Counts the numbers that move together: for query heads those of a whole group."""
    return size.unit * (dims.group if size.axis == "heads" else 1)


def is_shared_head(size: AxisSize, dims: Dimensions) -> bool:
    """Tells whether this is the one key-value head that all query heads share; it has no place to move to."""
    return size.axis == "kv_heads" and dims.kv_heads == 1


def _indices(order: list[int] | None, size: AxisSize, width: int, dims: Dimensions) -> Tensor:
    """Spells an order of units out as indices of single numbers, (width,)."""
    if order is None or is_shared_head(size, dims):
        return torch.arange(width)
    unit = numbers_per_unit(size, dims)
    return (torch.tensor(order)[:, None] * unit + torch.arange(unit)).flatten()
