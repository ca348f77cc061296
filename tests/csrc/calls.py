"""A right call of each function of the extension, and the ways to alter one argument of it.

A place in a call is a path: the argument's name, then the names or numbers that lead further into it.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from mlfs.ops.layer import LowRankLinear
from tests.csrc.helpers import BEST

Arguments = dict[str, Any]
Path = tuple[str | int, ...]


def some(*shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(sum(shape))) + 0.5


def layer(rows: int = 6, columns: int = 8, spans: tuple[int, ...] = (0, 2, 3, 3)) -> LowRankLinear:
    lora = [some(2, columns)], [some(rows, 2)], [0.5]
    return LowRankLinear(some(rows, columns), some(rows), *lora, list(spans))


def ranges() -> Tensor:
    return torch.tensor([[0, 0, 3, 0, 3, 0], [1, 0, 3, 0, 3, 0]])


def norm() -> tuple[Tensor, Tensor, float]:
    return some(8), some(8), 1e-5


def heads() -> Arguments:
    return {"q": some(2, 3, 4, 8), "k": some(2, 3, 2, 8), "v": some(2, 3, 2, 8)}


def linear(*tokens: int) -> Arguments:
    x, operand, residual = some(*tokens, 8), some(*tokens, 5), some(*tokens, 5)
    return {"x": x, "layers": [layer()], "activation": 3, "operand": operand, "residual": residual}


def encoder() -> Arguments:
    whole, up, down = (0, 8), layer(12, 8, (0, 12)), layer(8, 12, (0, 8))
    first = {"x": some(2, 3, 8), "projections": [layer(8, 8, whole) for _ in range(3)], "out": layer(8, 8, whole)}
    second = {"norm": norm(), "up": up, "activation": 1, "down": down, "last_norm": norm()}
    return {**first, **second, "ranges": ranges(), "dim": 4, "scale": 0.5}


CALLS: dict[str, Callable[[], Arguments]] = {
    "product": lambda: {"a": some(4, 8), "b": some(5, 8), "bias": some(5), "out": some(4, 5)},
    "linear": lambda: linear(2, 3),
    "encoder_layer": encoder,
    "linear_forward": lambda: {**linear(4), "keep": True},
    "linear_backward": lambda: {
        "dys": [some(4, 5)], "x": some(4, 8), "hs": [some(4, 2)], "layers": [layer()], "trains": [[True]],
        "needs_dx": True, "n": 8,
    },
    "activation_backward": lambda: {"dy": some(4, 5), "z": some(4, 5), "operand": some(4, 5), "activation": 3},
    "add_norm": lambda: {
        "x": some(4, 8), "residual": some(4, 8), "weight": some(8), "bias": some(8), "eps": 1e-5, "rms": False,
        "p": 0.5, "seed": 1,
    },
    "add_norm_backward": lambda: {
        "dy": some(4, 8), "ds": some(4, 8), "s": some(4, 8), "weight": some(8), "eps": 1e-5, "rms": False,
        "p": 0.5, "seed": 1, "trains": True,
    },
    "attention": lambda: {**heads(), "ranges": ranges(), "causal": True, "scale": 0.3, "p": 0.5, "seed": 1},
    "attention_backward": lambda: {
        "d_o": some(2, 3, 4, 8), **heads(), "o": some(2, 3, 4, 8), "lse": some(2, 3, 4), "ranges": ranges(),
        "causal": True, "scale": 0.3, "p": 0.5, "seed": 1,
    },
    "head_rows": lambda: {
        "z": some(4, 9), "u": some(4, 9), "labels": torch.tensor([0, 8, 3, 3]), "sums": some(2, 4), "alpha": 0.5,
        "temperature": 2.0, "smoothing": 0.1, "keep": True,
    },
    "rotary": lambda: {
        "q": some(2, 3, 4, 8), "k": some(2, 3, 2, 8), "cos": some(2, 3, 8), "sin": some(2, 3, 8), "back": False,
    },
    "dropout_mask": lambda: {"rows": 4, "columns": 9, "p": 0.5, "seed": 1},
    "instructions": dict,
    "limit_instructions": lambda: {"level": ("plain", "avx2", "avx512").index(BEST)},
}  # fmt: skip

WRITTEN = [("product", "out"), ("head_rows", "z"), ("head_rows", "sums")]  # what a call writes into
# what is refused unless its numbers lie side by side
SIDE_BY_SIDE = [*WRITTEN, ("head_rows", "u"), *((name, "ranges") for name, call in CALLS.items() if "ranges" in call())]


def places(value: Any, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """Yields every place in value but the whole, with what is there."""
    if path:
        yield path, value
    if isinstance(value, LowRankLinear):
        value = value._asdict()
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list | tuple) else ()
    for key, one in inner:
        yield from places(one, (*path, key))


def put(value: Any, path: Path, new: Any) -> Any:
    """Returns value with something new at the place."""
    if not path:
        return new
    key, *rest = path
    if isinstance(value, LowRankLinear):
        return value._replace(**{key: put(getattr(value, key), tuple(rest), new)})
    if isinstance(value, dict):
        return {**value, key: put(value[key], tuple(rest), new)}
    return type(value)(put(one, tuple(rest), new) if i == key else one for i, one in enumerate(value))


def each_tensor(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Returns value with every tensor in it changed."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, LowRankLinear):
        return LowRankLinear(*(each_tensor(one, change) for one in value))
    if isinstance(value, dict):
        return {key: each_tensor(one, change) for key, one in value.items()}
    return type(value)(each_tensor(one, change) for one in value) if isinstance(value, list | tuple) else value
