"""Times variants by turns on a CPU, and measures how fast plain matrix products are in the same run."""

import functools
import time
from collections.abc import Callable
from statistics import median, quantiles
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from mlfs.ops.backend import cpp

SQUARE = 1024  # rows and columns of the matrices whose product gives the rate
SQUARE_FLOPS = 2 * SQUARE**3


def alternate(variants: dict[str, Callable[[], Any]], repeats: int, title: str) -> dict[str, list[float]]:
    """Returns `repeats` times in seconds of each variant. They take turns, so that the machine's noise hits all alike.

    The first turn warms up and does not count.
    """
    times: dict[str, list[float]] = {name: [] for name in variants}
    for turn in tqdm(range(repeats + 1), desc=title, leave=False):
        for name, run in variants.items():
            start = time.perf_counter()
            run()
            if turn:
                times[name].append(time.perf_counter() - start)
    return times


def spread(values: list[float]) -> list[float]:
    """Returns [median, lower quartile, upper quartile] of two values or more."""
    low, _, high = quantiles(values, n=4)
    return [median(values), low, high]


def ratios(numerators: list[float], denominators: list[float]) -> list[float]:
    """Divides times of the same turn: what slowed one variant then probably slowed the other, too."""
    return [a / b for a, b in zip(numerators, denominators, strict=True)]


def torch_product() -> None:
    """Multiplies two matrices of SQUARE x SQUARE numbers, fp32, with PyTorch."""
    torch.mm(_square("a"), _square("b"), out=_square("out"))


def extension_product() -> None:
    """Multiplies the same with the C++ extension."""
    cpp().product(_square("a"), _square("b").t(), None, _square("out"))


@functools.cache
def _square(name: str) -> Tensor:
    return torch.randn(SQUARE, SQUARE)
