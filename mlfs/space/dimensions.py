"""Turns a subnet into the sizes of every layer, and these into how many numbers a module has along an axis."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from mlfs.errors import MLFSError
from mlfs.space.search_space import SearchSpace, evenly_spaced
from mlfs.space.subnet import Subnet


@dataclass(frozen=True)
class Dimensions:
    """States the full sizes of a model.

    Attributes:
        hidden: width of the residual stream.
        heads, kv_heads: query heads, and the key-value heads that they share.
        head_dim: numbers in a head.
        ffn: feed-forward units.
        layers: how many layers there are.
    """

    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    layers: int

    @property
    def group(self) -> int:
        """How many heads are kept or left out together: the query heads of one key-value head.

        1 where all query heads share one key-value head (multi-query attention), which every subnet keeps.
        """
        return 1 if self.kv_heads == 1 else self.heads // self.kv_heads

    def check(self, space: SearchSpace) -> None:
        """Raises MLFSError unless `space` starts at these sizes and its heads come in whole groups."""
        layers: Any = self.layers if space.counts_layers else tuple(range(self.layers))
        full = Subnet(self.hidden, self.heads, self.ffn, layers)
        for axis in ("hidden", "heads", "ffn", "layers"):
            first, size = getattr(space.max, axis), getattr(full, axis)
            if first != size:
                too_large = isinstance(first, int) and first > size
                why = "is larger than the model" if too_large else "does not start at the full model"
                raise MLFSError(f"the space's {axis} {why}: its first choice is {first}, the model has {size}")
        for heads in space.heads:
            if heads % self.group:
                raise MLFSError(
                    f"heads={heads} is not a whole number of groups: {self.heads} query heads share "
                    f"{self.kv_heads} key-value heads, so use multiples of {self.group}"
                )

    def default_space(self) -> SearchSpace:
        """Makes the space of a model for which none is given.

        It offers all, two thirds and half of the heads (in whole groups) and of the hidden size; all, half and a
        quarter of the feed-forward units; all and half of the layers.
        """
        groups = self.heads // self.group
        heads = _descending(round(groups * share) * self.group for share in (1, 2 / 3, 1 / 2))
        # Whole heads where the head size is hidden / heads: only such pairs of sizes can then be exported.
        step = self.head_dim if self.hidden == self.heads * self.head_dim else 8
        hidden = _descending(round(self.hidden * count / self.heads / step) * step for count in heads[1:])
        ffn = _descending(self.ffn // divisor for divisor in (2, 4))
        depths = _descending((self.layers, (self.layers + 1) // 2))
        return SearchSpace(
            hidden=(self.hidden, *(size for size in hidden if size < self.hidden)),
            heads=heads,
            ffn=(self.ffn, *(size for size in ffn if size < self.ffn)),
            layers=depths,
        )

    def layer_sizes(self, subnet: Subnet, kept: tuple[int, ...] | None = None) -> "LayerSizes":
        """Spells `subnet` out for every layer of the full model; a layer that is left out has size 0.

        Args:
            kept: the layers that it keeps, where it says only how many; by default evenly spaced ones.
        """
        if kept is None:
            kept = evenly_spaced(self.layers, subnet.layers) if isinstance(subnet.layers, int) else subnet.layers
        heads, ffn = [0] * self.layers, [0] * self.layers
        for axis, spelled in (("heads", heads), ("ffn", ffn)):
            for layer, size in zip(kept, subnet.per_layer(axis), strict=True):
                spelled[layer] = size
        kv_heads = [self._kv_heads_of(count) for count in heads]
        of_layer = {"heads": tuple(heads), "kv_heads": tuple(kv_heads), "ffn": tuple(ffn)}
        return LayerSizes(subnet, of_layer, self.head_dim)

    def _kv_heads_of(self, heads: int) -> int:
        """Counts the key-value heads that a number of query heads needs."""
        return min(heads, 1) if self.kv_heads == 1 else heads // self.group


@dataclass(frozen=True)
class LayerSizes:
    """Spells a subnet out per layer of the full model.

    Attributes:
        of_layer: for each axis ("heads", "kv_heads", "ffn") one size per layer; 0 where the layer is left out.
        head_dim: numbers in a head, the same in every layer.
    """

    subnet: Subnet
    of_layer: dict[str, tuple[int, ...]]
    head_dim: int

    def __hash__(self) -> int:
        return hash(self.subnet)

    @property
    def count(self) -> int:
        """How many layers the full model has."""
        return len(self.of_layer["heads"])

    def keeps(self, layer: int) -> bool:
        """Tells whether the layer runs."""
        return self.of_layer["heads"][layer] > 0

    @property
    def layers(self) -> tuple[int, ...]:
        """Lists the layers that run."""
        return tuple(layer for layer in range(self.count) if self.keeps(layer))


@dataclass(frozen=True)
class RowSizes(LayerSizes):
    """Holds the sizes of each row of a batch, and maxnet's for all that the rows share.

    Attributes:
        rows: the sizes of row 0, 1, ... of the batch.
    """

    rows: tuple[LayerSizes, ...] = ()

    def __hash__(self) -> int:
        return hash(self.rows)

    def keeps(self, layer: int) -> bool:
        """Tells whether the layer runs for any row."""
        return any(sizes.keeps(layer) for sizes in self.rows)

    def runs(self, batch: int) -> list[tuple[int, int, LayerSizes]]:
        """Splits the batch where neighbouring rows differ: (first row, row after the last, sizes) of each run.

        Raises:
            MLFSError: the number of rows in the batch is not that of the subnets given.
        """
        if batch != len(self.rows):
            raise MLFSError(
                f"activate_rows was given {len(self.rows)} subnets, but {batch} rows run: give one for each row "
                "(each beam and each returned sequence is a row)"
            )
        return self._runs

    @cached_property
    def _runs(self) -> list[tuple[int, int, LayerSizes]]:
        count = len(self.rows)
        starts = [row for row in range(count) if row == 0 or self.rows[row] != self.rows[row - 1]]
        ends = [*starts[1:], count]
        return [(start, end, self.rows[start]) for start, end in zip(starts, ends, strict=True)]


@dataclass(frozen=True)
class AxisSize:
    """Computes how many numbers a module has along an axis: the size there times `unit`.

    Attributes:
        axis: "hidden", "heads", "kv_heads", "ffn"; or "group", the query heads that share one key-value head.
        unit: numbers per unit of the axis, e.g. head_dim for heads.
        layer: which layer's size counts; None for "hidden", which all layers share.
    """

    axis: str
    unit: int = 1
    layer: int | None = None

    def __call__(self, sizes: LayerSizes) -> int:
        """Returns the number of numbers under `sizes`."""
        if self.axis == "hidden":
            return sizes.subnet.hidden * self.unit
        assert self.layer is not None
        if self.axis == "group":
            kv_heads = max(sizes.of_layer["kv_heads"][self.layer], 1)  # 0 where the layer is left out
            return sizes.of_layer["heads"][self.layer] // kv_heads
        return sizes.of_layer[self.axis][self.layer] * self.unit


def _descending(values: Iterable[int]) -> tuple[int, ...]:
    """Sorts sizes, largest first, each once and at least 1."""
    return tuple(sorted({max(value, 1) for value in values}, reverse=True))
