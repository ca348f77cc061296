"""Which layers a subnet keeps that says only how many."""

from collections.abc import Sequence
from dataclasses import replace

from mlfs.space.search_space import SearchSpace, evenly_spaced
from mlfs.space.subnet import Subnet


def layers_of_depth(depth: int, space: SearchSpace, ranking: Sequence[int] | None) -> tuple[int, ...] | None:
    """Lists the layers that the subnets of a depth keep, ascending.

    Args:
        ranking: all layers, those that matter most first; None while they are not ranked.

    Returns:
        Where the space gives numbers of layers: the first of the ranking, or without one evenly spaced layers. Where it
        names layers: the one choice of so many. None where it has no such depth, or several choices of it.
    """
    if space.counts_layers:
        if depth not in space.layers:
            return None
        if ranking is not None:
            return tuple(sorted(ranking[:depth]))
        return evenly_spaced(space.max.depth, depth)
    choices = [kept for kept in space.layers if isinstance(kept, tuple) and len(kept) == depth]
    return choices[0] if len(choices) == 1 else None


def as_offered(subnet: Subnet, space: SearchSpace, ranking: Sequence[int] | None) -> Subnet:
    """Says the layers of a subnet as the space does, by number or by name, where both mean the same ones."""
    kept = layers_of_depth(subnet.depth, space, ranking)
    if kept is None or isinstance(subnet.layers, int) == space.counts_layers:
        return subnet
    if isinstance(subnet.layers, int):
        return replace(subnet, layers=kept)
    return replace(subnet, layers=subnet.depth) if subnet.layers == kept else subnet
