"""`SearchSpace`, the sizes that a super-transformer offers."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from mlfs.errors import MLFSError
from mlfs.space.subnet import Subnet, as_tuple, is_int


@dataclass(frozen=True)
class SearchSpace:
    """Lists the sizes on offer, each axis from the full model downwards.

    Attributes:
        hidden, heads, ffn: descending, unique; the first of each is the full model's.
        layers: how many layers are kept, descending, the first all of them: which, the super-transformer
            settles when it is ordered. Or tuples of kept layer indices, which stay as given; the first keeps all
            layers, none keeps more than the one before it.
        per_layer: whether `sample` draws heads and ffn anew for every layer.

    Raises:
        MLFSError: the sizes of an axis are not positive, unique and descending, or the layers are not as above.

    >>> space = SearchSpace(hidden=(384, 192), heads=(12, 6), ffn=(1536, 768), layers=(4, 2))
    >>> str(space.max), str(space.min)
    ('384/12/1536/4', '192/6/768/2')
    """

    hidden: tuple[int, ...]
    heads: tuple[int, ...]
    ffn: tuple[int, ...]
    layers: tuple[int, ...] | tuple[tuple[int, ...], ...]
    per_layer: bool = False

    def __post_init__(self) -> None:
        for name in ("hidden", "heads", "ffn"):
            self._check_sizes(name)
        given = as_tuple(self.layers)
        if given and all(is_int(count) for count in given):
            self._check_sizes("layers")
        else:
            self._check_layers(tuple(map(as_tuple, given)))

    def _check_sizes(self, name: str) -> None:
        """Raises MLFSError unless an axis has positive, unique, descending sizes."""
        value = getattr(self, name)
        sizes = (value,) if is_int(value) else as_tuple(value)
        if not sizes or any(not is_int(size) or size < 1 for size in sizes):
            raise MLFSError(f"{name}={value!r}: expected positive integers")
        if list(sizes) != sorted(set(sizes), reverse=True):
            raise MLFSError(f"{name}={value!r}: expected unique sizes in descending order, largest first")
        object.__setattr__(self, name, sizes)

    def _check_layers(self, choices: tuple[tuple, ...]) -> None:
        """Raises MLFSError unless each choice names layers, out of those of the first, which is the deepest."""
        if not choices or not all(choices) or any(not is_int(i) for kept in choices for i in kept):
            raise MLFSError(f"layers={self.layers!r}: expected numbers of layers, or tuples of layer indices")
        if len(set(choices)) != len(choices):
            raise MLFSError(f"layers={self.layers!r}: expected each choice of kept layers once")
        for kept in choices:
            Subnet(1, 1, 1, kept)
            if not set(kept) <= set(choices[0]):
                raise MLFSError(f"layers: {kept} keeps layers that the first choice {choices[0]} does not have")
        if [len(kept) for kept in choices] != sorted((len(kept) for kept in choices), reverse=True):
            raise MLFSError(f"layers={self.layers!r}: expected the deepest choice first")
        object.__setattr__(self, "layers", choices)

    @property
    def counts_layers(self) -> bool:
        """Whether depths are given as numbers of layers: which layers these are is then found by measurement."""
        return isinstance(self.layers[0], int)

    @property
    def max(self) -> Subnet:
        """The largest subnet: the whole model."""
        return Subnet(self.hidden[0], self.heads[0], self.ffn[0], self.layers[0])

    @property
    def min(self) -> Subnet:
        """The smallest subnet."""
        return Subnet(self.hidden[-1], self.heads[-1], self.ffn[-1], self.layers[-1])

    def sample(self, generator: torch.Generator | None = None, depths: bool = True) -> Subnet:
        """Draws a subnet: each axis by itself, every size on offer equally likely.

        Args:
            generator: where the random numbers come from; by default PyTorch's global one.
            depths: whether the number of layers is drawn too; else all layers are kept.
        """

        def draw(choices: tuple) -> Any:
            return choices[int(torch.randint(len(choices), (1,), generator=generator))]

        layers = draw(self.layers) if depths else self.layers[0]
        count = 1
        if self.per_layer:
            count = layers if isinstance(layers, int) else len(layers)
        heads = tuple(draw(self.heads) for _ in range(count))
        ffn = tuple(draw(self.ffn) for _ in range(count))
        return Subnet(draw(self.hidden), heads, ffn, layers)

    def sample_level(self, generator: torch.Generator | None = None, depths: bool = True) -> Subnet:
        """Draws a subnet that is equally wide on every axis: at the same relative place in each list of sizes.

        Never the full model, unless the space offers nothing else. Arguments: as `sample`.
        """
        lists = (self.hidden, self.heads, self.ffn)
        last = max(len(choices) for choices in lists) - 1  # the narrowest level; 0 is the full width
        kept = self.layers if depths else self.layers[:1]
        pairs = [(level, layers) for level in range(last + 1) for layers in kept]
        smaller = pairs[1:] or pairs  # the first pair is the full model
        level, layers = smaller[int(torch.randint(len(smaller), (1,), generator=generator))]
        share = level / max(last, 1)
        hidden, heads, ffn = (choices[round(share * (len(choices) - 1))] for choices in lists)
        return Subnet(hidden, heads, ffn, layers)

    def __contains__(self, subnet: object) -> bool:
        return isinstance(subnet, Subnet) and not self._misfit(subnet)

    def check(self, subnet: Subnet) -> None:
        """Raises MLFSError, which names the axis and the sizes on offer, unless `subnet` is in the space."""
        if misfit := self._misfit(subnet):
            raise MLFSError(f"subnet {subnet} is outside the space: {misfit}")

    def uniform(self) -> Iterator[Subnet]:
        """Yields every subnet whose layers have equal sizes, the largest first."""
        for layers in self.layers:
            for hidden, heads, ffn in itertools.product(self.hidden, self.heads, self.ffn):
                yield Subnet(hidden, heads, ffn, layers)

    def palette(self) -> dict[str, Subnet]:
        """Names the subnets that every evaluation shows: max, min, and two between, one of which is of full depth.

        A subnet between that equals max or min is left out.
        """

        def middle(choices: tuple) -> Any:
            return choices[len(choices) // 2] if len(choices) > 2 else choices[-1]

        wide = Subnet(self.hidden[0], middle(self.heads), middle(self.ffn), self.layers[0])
        medium = Subnet(middle(self.hidden), middle(self.heads), middle(self.ffn), middle(self.layers))
        named = {"max": self.max, "medium-wide": wide, "medium": medium, "min": self.min}
        ends = (self.max, self.min)
        return {name: subnet for name, subnet in named.items() if name in ("max", "min") or subnet not in ends}

    def to_dict(self) -> dict[str, Any]:
        """Returns the fields by name, tuples as lists: a dictionary that JSON can hold."""
        value: dict[str, Any] = {name: list(getattr(self, name)) for name in ("hidden", "heads", "ffn")}
        layers = [kept if isinstance(kept, int) else list(kept) for kept in self.layers]
        return value | {"layers": layers, "per_layer": self.per_layer}

    @classmethod
    def from_dict(cls, value: dict[str, Any]) -> "SearchSpace":
        """Makes the space that `to_dict` wrote.

        Raises:
            MLFSError: a key is missing or unknown, or a value is not what the field takes.
        """
        names = {"hidden", "heads", "ffn", "layers"}
        if not isinstance(value, dict) or not names <= set(value) <= names | {"per_layer"}:
            raise MLFSError(f"a search space needs the keys {sorted(names)} (and may have per_layer), got {value!r}")
        return cls(**{name: value[name] for name in names}, per_layer=bool(value.get("per_layer", False)))

    def with_per_layer(self, per_layer: bool = True) -> "SearchSpace":
        """Returns the space with the same sizes whose `sample` draws per layer, or does not."""
        return replace(self, per_layer=per_layer)

    def _misfit(self, subnet: Subnet) -> str:
        """Says which size of `subnet` is not on offer; "" if all are."""
        if subnet.hidden not in self.hidden:
            return f"hidden={subnet.hidden} is not one of {self.hidden}"
        for axis in ("heads", "ffn"):
            odd = set(subnet.per_layer(axis)) - set(getattr(self, axis))
            if odd:
                return f"{axis}={min(odd)} is not one of {getattr(self, axis)}"
        if subnet.layers not in self.layers:
            return f"layers={subnet.layers} is not one of {self.layers}"
        return ""


def evenly_spaced(layers: int, kept: int) -> tuple[int, ...]:
    """Chooses `kept` of the indices 0 to `layers` - 1, evenly spread and ascending, 0 included.

    Raises:
        MLFSError: `kept` is not between 1 and `layers`.

    >>> evenly_spaced(6, 3), evenly_spaced(12, 8)
    ((0, 2, 4), (0, 1, 3, 4, 6, 7, 9, 10))
    """
    if not 1 <= kept <= layers:
        raise MLFSError(f"cannot keep {kept} of {layers} layers")
    return tuple(i * layers // kept for i in range(kept))
