"""The values that operators take: a low-rank layer, what is done to its output, and which gradients are wanted.

`torch.library` knows tensors, numbers and lists of them, but no such values: `flatten` lays layers out as lists where
an operator is called, and `unflatten` puts them together again inside it. Nothing else takes layers apart.
"""

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

    @property
    def ranks(self) -> list[int]:
        """The rank r_s of each stage."""
        return [lora_a.shape[0] for lora_a in self.lora_a]

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """All its tensors, of which a backend may ask type and device."""
        return (self.weight, self.bias, *self.lora_a, *self.lora_b)

    @property
    def places(self) -> list[tuple[slice, slice]]:
        """Each span as (rows of `weight`, columns of the output, where spans lie side by side)."""
        found, column = [], 0
        for start, length in zip(self.spans[::2], self.spans[1::2], strict=True):
            found.append((slice(start, start + length), slice(column, column + length)))
            column += length
        return found


class Epilogue(NamedTuple):
    """What is done to a product z while it is in registers: y = act(z) [· operand] + residual.

    Attributes:
        activation: one of ACTIVATIONS; "silu_mul" is SiLU(z) · operand.
        operand, residual: (..., m), or None.

    A tuple, since one is made at every call of a layer: a frozen dataclass takes three times as long.
    """

    activation: str = "none"
    operand: Tensor | None = None
    residual: Tensor | None = None


NOTHING = Epilogue()


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


class Norm(NamedTuple):
    """A norm: weight and bias (N,) or None, what is added to the variance, and whether it leaves out the mean (RMS)."""

    weight: Tensor | None
    bias: Tensor | None
    eps: float
    rms: bool

    def cut(self, columns: int) -> "Norm":
        """The norm over the leading `columns` numbers."""
        weight, bias = self.weight, self.bias
        if weight is not None:
            weight = weight[:columns]
        if bias is not None:
            bias = bias[:columns]
        return Norm(weight, bias, self.eps, self.rms)


class Dropout(NamedTuple):
    """A dropout: its probability, and what its mask is drawn from: one int64, None where nothing is dropped."""

    p: float
    seed: Tensor | None

    @property
    def number(self) -> int:
        """The seed as a number, on the host."""
        return 0 if self.seed is None else int(self.seed)


class FlatLayers(NamedTuple):
    """Layers as lists that torch.library takes: the fields of the first layer, then those of the second, and so on."""

    weights: list[Tensor]
    biases: list[Tensor]
    lora_a: list[Tensor]
    lora_b: list[Tensor]
    scales: list[float]
    spans: list[int]


def flatten(layers: Sequence[LowRankLinear]) -> FlatLayers:
    """Lays layers out as lists. They are alike: in the number of stages and spans, and all with a bias or none."""
    return FlatLayers(
        [layer.weight for layer in layers],
        [layer.bias for layer in layers if layer.bias is not None],
        [lora_a for layer in layers for lora_a in layer.lora_a],
        [lora_b for layer in layers for lora_b in layer.lora_b],
        [scale for layer in layers for scale in layer.scales],
        [number for layer in layers for number in layer.spans],
    )


def unflatten(
    weights: list[Tensor],
    biases: list[Tensor],
    lora_a: list[Tensor],
    lora_b: list[Tensor],
    scales: list[float],
    spans: list[int],
) -> list[LowRankLinear]:
    """Puts together what `flatten` laid out; without `biases`, layers without a bias (backward passes need none)."""
    stages = len(lora_a) // len(weights)
    numbers = len(spans) // len(weights)
    layers = []
    for i, weight in enumerate(weights):
        bias = biases[i] if biases else None
        own = slice(i * stages, (i + 1) * stages)
        rows = spans[i * numbers : (i + 1) * numbers]
        layers.append(LowRankLinear(weight, bias, lora_a[own], lora_b[own], scales[own], rows))
    return layers
