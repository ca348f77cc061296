"""From a subnet to the sizes of every layer, and to how many numbers a module has along an axis."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from mlfs.errors import MLFSError
from mlfs.space.search_space import SearchSpace, evenly_spaced
from mlfs.space.subnet import Subnet


@dataclass(frozen=True)
class Dimensions:
    """Full sizes of a model. `group` is the number of query heads per key-value head; heads move in whole groups,
    save where all share one key-value head (multi-query), which then stays."""

    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    layers: int

    @property
    def group(self) -> int:
        return 1 if self.kv_heads == 1 else self.heads // self.kv_heads

    def check(self, space: SearchSpace) -> None:
        """MLFSError unless the space starts at these sizes and heads come in whole groups."""
        full = Subnet(self.hidden, self.heads, self.ffn, tuple(range(self.layers)))
        for axis in ("hidden", "heads", "ffn", "layers"):
            first, size = getattr(space.max, axis), getattr(full, axis)
            if first != size:
                too_large = axis != "layers" and first > size
                why = "is larger than the model" if too_large else "does not start at the full model"
                raise MLFSError(f"the space's {axis} {why}: its first choice is {first}, the model has {size}")
        for heads in space.heads:
            if heads % self.group:
                raise MLFSError(
                    f"heads={heads} is not a whole number of groups: {self.heads} query heads share "
                    f"{self.kv_heads} key-value heads, so use multiples of {self.group}"
                )

    def default_space(self) -> SearchSpace:
        """Full, two thirds and half of the heads (in whole groups) and of the width; full, half and quarter
        feed-forward; all layers and every other one."""
        groups = self.heads // self.group
        heads = _descending(round(groups * share) * self.group for share in (1, 2 / 3, 1 / 2))
        step = self.head_dim if self.hidden == self.heads * self.head_dim else 8
        hidden = _descending(round(self.hidden * h / self.heads / step) * step for h in heads[1:])
        ffn = _descending(self.ffn // share for share in (2, 4))
        depths = _descending((self.layers, (self.layers + 1) // 2))
        return SearchSpace(
            hidden=(self.hidden, *(h for h in hidden if h < self.hidden)),
            heads=heads,
            ffn=(self.ffn, *(f for f in ffn if f < self.ffn)),
            layers=tuple(evenly_spaced(self.layers, kept) for kept in depths),
        )

    def layer_sizes(self, subnet: Subnet) -> "LayerSizes":
        """Spells `subnet` out for every layer; a layer that is left out has size 0."""
        heads, ffn = [0] * self.layers, [0] * self.layers
        for layer, h, f in zip(subnet.layers, subnet.per_layer("heads"), subnet.per_layer("ffn"), strict=True):
            heads[layer], ffn[layer] = h, f
        kv = [0 if not h else 1 if self.kv_heads == 1 else h // self.group for h in heads]
        return LayerSizes(subnet, {"heads": tuple(heads), "kv_heads": tuple(kv), "ffn": tuple(ffn)})


@dataclass(frozen=True)
class LayerSizes:
    """A subnet, spelled out per layer of the full model."""

    subnet: Subnet
    of_layer: dict[str, tuple[int, ...]]

    def __hash__(self) -> int:
        return hash(self.subnet)

    @property
    def count(self) -> int:
        """How many layers the full model has."""
        return len(self.of_layer["heads"])

    def keeps(self, layer: int) -> bool:
        """Tells whether the layer runs."""
        return self.of_layer["heads"][layer] > 0


@dataclass(frozen=True)
class RowSizes(LayerSizes):
    """Maxnet's sizes, for all that rows share, and those of each row of the batch."""

    rows: tuple[LayerSizes, ...] = ()

    def __hash__(self) -> int:
        return hash(self.rows)

    def keeps(self, layer: int) -> bool:
        return any(sizes.keeps(layer) for sizes in self.rows)

    def runs(self, batch: int) -> list[tuple[int, int, LayerSizes]]:
        """(first row, end, sizes) of neighbours of one size; MLFSError unless the batch has that many rows."""
        if batch != len(self.rows):
            raise MLFSError(
                f"activate_rows was given {len(self.rows)} subnets, but {batch} rows run: give one for each row "
                "(each beam and each returned sequence is a row)"
            )
        return self._runs

    @cached_property
    def _runs(self) -> list[tuple[int, int, LayerSizes]]:
        count = len(self.rows)
        edges = [i for i in range(count) if i == 0 or self.rows[i] != self.rows[i - 1]]
        return [(a, b, self.rows[a]) for a, b in zip(edges, [*edges[1:], count], strict=True)]


@dataclass(frozen=True)
class AxisSize:
    """How many numbers a module has along an axis: its size there times `unit` (e.g. head_dim for heads)."""

    axis: str
    unit: int = 1
    layer: int | None = None

    def __call__(self, sizes: LayerSizes) -> int:
        if self.axis == "hidden":
            return sizes.subnet.hidden * self.unit
        if self.axis == "group":
            assert self.layer is not None
            return sizes.of_layer["heads"][self.layer] // max(sizes.of_layer["kv_heads"][self.layer], 1)
        assert self.layer is not None
        return sizes.of_layer[self.axis][self.layer] * self.unit


def _descending(values: Any) -> tuple[int, ...]:
    return tuple(sorted({max(int(v), 1) for v in values}, reverse=True))
