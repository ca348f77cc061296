"""The values that operators take: a low-rank layer, what is done to its output, and which gradients are wanted."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

ACTIVATIONS = ("none", "gelu", "gelu_tanh", "silu_mul")


class LowRankLinear(NamedTuple):
    """One linear layer with its low-rank stages, as it is read now.

    Attributes:
        weight: (M, N), any strides. bias: (M,) or None.
        lora_a, lora_b, scales: of each stage s (r_s, N), (M, r_s) and a number; may be empty.
        spans: the rows of `weight` that are read, as flat (start, length, start, length, ...).

    A tuple, since the extension for CPUs takes it as it is, and one is made at every call of a layer.
    """

    weight: Tensor
    bias: Tensor | None
    lora_a: Sequence[Tensor]
    lora_b: Sequence[Tensor]
    scales: Sequence[float]
    spans: Sequence[int]

    @property
    def rows(self) -> int:
        """How many numbers the layer writes: m."""
        return sum(self.spans[1::2])


@dataclass(frozen=True)
class Epilogue:
    """What is done to a product z while it is in registers: y = act(z) [· operand] + residual.

    Attributes:
        activation: one of ACTIVATIONS; "silu_mul" is SiLU(z) · operand.
        operand, residual: (..., m), or None.
    """

    activation: str = "none"
    operand: Tensor | None = None
    residual: Tensor | None = None


@dataclass(frozen=True)
class Activated:
    """How an input x was made: x = act(pre) [· operand], all (tokens, n)."""

    activation: str
    pre: Tensor
    operand: Tensor | None = None


@dataclass(frozen=True)
class Wanted:
    """Which gradients a backward pass makes.

    Attributes:
        trains: of each stage (of each layer in turn), whether its A and B get a gradient.
        dx: whether the input does. columns: n, the width of the input.
    """

    trains: Sequence[bool]
    dx: bool
    columns: int
