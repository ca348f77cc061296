"""`Subnet`, the one value that says what runs."""

import json
from dataclasses import asdict, dataclass
from typing import Any

from mlfs.errors import MLFSError
from mlfs.parsing import parse_json

PerLayer = int | tuple[int, ...]


@dataclass(frozen=True)
class Subnet:
    """States one choice of sizes: immutable, hashable, and the same after a round trip through JSON.

    Attributes:
        hidden: width of the residual stream.
        heads: query heads, one number for all kept layers or one per kept layer.
        ffn: feed-forward units, likewise.
        layers: indices of the kept layers, ascending; or how many are kept. Which these are, the super-transformer says
            (`SuperTransformer.kept_layers`): those that matter most, once it is ordered.

    Raises:
        MLFSError: a size is no positive integer, a number of sizes does not fit, or the layers are not ascending.

    >>> Subnet(hidden=256, heads=(8, 8), ffn=(1024, 512), layers=(0, 2))
    Subnet(hidden=256, heads=8, ffn=(1024, 512), layers=(0, 2))
    >>> Subnet.from_json('{"hidden": 256, "heads": 8, "ffn": 1024, "layers": [0, 2]}').layers
    (0, 2)
    >>> Subnet(hidden=256, heads=8, ffn=1024, layers=2).depth
    2
    """

    hidden: int
    heads: PerLayer
    ffn: PerLayer
    layers: int | tuple[int, ...]

    def __post_init__(self) -> None:
        if is_int(self.layers):
            if not isinstance(self.layers, int) or self.layers < 1:
                raise MLFSError(f"layers={self.layers!r}: expected a positive number of layers, or their indices")
        else:
            layers = as_tuple(self.layers)
            if not layers or any(not is_int(i) or i < 0 for i in layers) or sorted(set(layers)) != list(layers):
                raise MLFSError(
                    f"layers={self.layers!r}: expected a number of layers, or ascending, unique indices of at least one"
                )
            object.__setattr__(self, "layers", layers)
        if not is_int(self.hidden) or self.hidden < 1:
            raise MLFSError(f"hidden={self.hidden!r}: expected a positive integer")
        for name in ("heads", "ffn"):
            value = getattr(self, name)
            sizes = (value,) if is_int(value) else as_tuple(value)
            if not sizes or any(not is_int(size) or size < 1 for size in sizes):
                raise MLFSError(f"{name}={value!r}: expected a positive integer, or one per kept layer")
            if len(sizes) not in (1, self.depth):
                raise MLFSError(f"{name} has {len(sizes)} sizes for {self.depth} kept layers: give one, or one each")
            object.__setattr__(self, name, sizes[0] if len(set(sizes)) == 1 else sizes)

    @property
    def depth(self) -> int:
        """How many layers are kept."""
        return self.layers if isinstance(self.layers, int) else len(self.layers)

    def per_layer(self, axis: str) -> tuple[int, ...]:
        """Returns the sizes along `axis`, which is "heads" or "ffn": one per kept layer, in their order."""
        value: PerLayer = getattr(self, axis)
        return (value,) * self.depth if isinstance(value, int) else value

    @property
    def is_uniform(self) -> bool:
        """Tells whether every kept layer has the same sizes."""
        return isinstance(self.heads, int) and isinstance(self.ffn, int)

    def to_dict(self) -> dict[str, Any]:
        """Returns the fields by name, tuples as lists: a dictionary that JSON can hold."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    def to_json(self) -> str:
        """Returns the subnet as one line of JSON."""
        return json.dumps(self.to_dict())

    @classmethod
    def from_dict(cls, value: dict[str, Any]) -> "Subnet":
        """Makes the subnet that a dictionary describes.

        Raises:
            MLFSError: a key is missing or unknown, or a value is not what the field takes.
        """
        names = {"hidden", "heads", "ffn", "layers"}
        if not isinstance(value, dict) or set(value) != names:
            raise MLFSError(f"a subnet needs exactly the keys {sorted(names)}, got {value!r}")
        if not isinstance(value["layers"], (list, tuple)) and not is_int(value["layers"]):
            raise MLFSError(f"layers={value['layers']!r}: expected a number of layers, or a list of their indices")
        fields: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in value.items()}
        return cls(**fields)

    @classmethod
    def from_json(cls, text: str) -> "Subnet":
        """Makes the subnet that `to_json` wrote.

        Raises:
            MLFSError: the text is no JSON, or as `from_dict`.
        """
        return cls.from_dict(parse_json(text, f"the subnet {text[:200]!r}", f"e.g. {_EXAMPLE}"))

    def __str__(self) -> str:
        def show(value: PerLayer) -> str:
            return str(value) if isinstance(value, int) else "(" + ",".join(map(str, value)) + ")"

        return f"{self.hidden}/{show(self.heads)}/{show(self.ffn)}/{self.depth}"


_EXAMPLE = '{"hidden": 256, "heads": 8, "ffn": 1024, "layers": 3}'


def is_int(value: object) -> bool:
    """Tells whether `value` is an integer; True and False are none here."""
    return isinstance(value, int) and not isinstance(value, bool)


def as_tuple(value: object) -> tuple:
    """Makes a tuple of a list, tuple or range; of anything else the empty one, which every check refuses."""
    return tuple(value) if isinstance(value, (list, tuple, range)) else ()
