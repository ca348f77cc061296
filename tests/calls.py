"""Calls of the sliced linear operator: examples, random ones, and the dense product they must equal."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from mlfs.ops.layer import ACTIVATIONS, Epilogue, LowRankLinear, flatten


@dataclass(frozen=True)
class Call:
    """Arguments of one call."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    lora_a: list[Tensor]
    lora_b: list[Tensor]
    scales: list[float]
    spans: list[int]
    activation: str = "none"
    operand: Tensor | None = None
    residual: Tensor | None = None

    def __call__(self, op) -> Tensor:
        return op(self.x, self.layer, self.epilogue)

    @property
    def layer(self) -> LowRankLinear:
        return LowRankLinear(self.weight, self.bias, self.lora_a, self.lora_b, self.scales, self.spans)

    @property
    def epilogue(self) -> Epilogue:
        return Epilogue(self.activation, self.operand, self.residual)

    @property
    def arguments(self) -> tuple[Any, ...]:
        """As the operator of torch.library takes them, but for whether anything is kept."""
        return self.x, self.operand, self.residual, *flatten([self.layer]), self.activation

    @property
    def leaves(self) -> list[Tensor]:
        others = [t for t in (self.operand, self.residual) if t is not None]
        return [self.x, *self.lora_a, *self.lora_b, *others]

    @property
    def rows(self) -> list[int]:
        pairs = zip(self.spans[::2], self.spans[1::2], strict=True)
        return [row for start, length in pairs for row in range(start, start + length)]

    def dense(self) -> Tensor:
        """The same with a merged matrix, in float64, one token at a time."""
        merged = self.weight.double()
        for a, b, c in zip(self.lora_a, self.lora_b, self.scales, strict=True):
            merged = merged + c * b.double() @ a.double()
        sliced = merged[self.rows][:, : self.x.shape[-1]]
        y = torch.einsum("...n,mn->...m", self.x.double(), sliced)
        y = y if self.bias is None else y + self.bias.double()[self.rows]
        if self.activation == "gelu":
            y = 0.5 * y * (1 + torch.erf(y / 2**0.5))
        if self.activation == "gelu_tanh":
            y = 0.5 * y * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (y + 0.044715 * y**3)))
        if self.operand is not None:
            y = y / (1 + torch.exp(-y)) * self.operand.double()
        return y if self.residual is None else y + self.residual.double()

    def trains(self, x: bool = True, stages: tuple[int, ...] = ()) -> "Call":
        """The same arguments as new leaves, of which x and the adapters of `stages` want gradients."""

        def leaf(t: Tensor, wants: bool) -> Tensor:
            return t.detach().requires_grad_(wants)

        a = [leaf(t, s in stages) for s, t in enumerate(self.lora_a)]
        b = [leaf(t, s in stages) for s, t in enumerate(self.lora_b)]
        others = {name: t if (t := getattr(self, name)) is None else leaf(t, x) for name in ("operand", "residual")}
        return replace(self, x=leaf(self.x, x), lora_a=a, lora_b=b, **others)

    def gradients(self, op, dy: Tensor) -> list[Tensor | None]:
        self(op).backward(dy)
        return [t.grad for t in self.leaves]


def strided(shape: tuple[int, ...], layout: str, generator: torch.Generator, dtype: torch.dtype) -> Tensor:
    """Random numbers of this shape, laid out so that not every view of them is contiguous."""

    def randn(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64).to(dtype)

    if layout == "transposed" and len(shape) > 1:
        return randn(*shape[:-2], shape[-1], shape[-2]).transpose(-1, -2)
    if layout == "inside":
        return randn(*(size + 2 for size in shape))[tuple(slice(1, size + 1) for size in shape)]
    if layout == "every second":
        return randn(*(2 * size for size in shape))[(slice(None, None, 2),) * len(shape)]
    if layout == "expanded" and len(shape) > 1:
        return randn(*(1 for _ in shape[:-1]), shape[-1]).expand(shape)
    return randn(*shape)


LAYOUTS = ("plain", "transposed", "inside", "every second")


@st.composite
def calls(draw, dtype: torch.dtype = torch.float64, tokens: int = 5, size: int = 12, rank: int = 4) -> Call:
    """Calls of at most `tokens` along each leading axis, `size` rows and columns, ranks up to `rank`."""
    out, full = draw(st.integers(1, size)), draw(st.integers(1, size))
    n = draw(st.integers(1, full))
    leading = tuple(draw(st.lists(st.integers(0, tokens), max_size=3)))
    # Spans lie in order and apart, as the parts of a fused projection do.
    edges = sorted(draw(st.sets(st.integers(0, out), min_size=2, max_size=6)))
    edges = edges[: len(edges) // 2 * 2]
    spans = [number for i in range(0, len(edges), 2) for number in (edges[i], edges[i + 1] - edges[i])]
    ranks = draw(st.lists(st.integers(1, rank), max_size=3))
    scales = [draw(st.sampled_from([2.0, 0.5, -1.25])) for _ in ranks]
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    x = strided((*leading, n), draw(st.sampled_from((*LAYOUTS, "expanded"))), generator, dtype)
    weight = strided((out, full), draw(st.sampled_from(LAYOUTS)), generator, dtype)
    bias = strided((out,), draw(st.sampled_from(LAYOUTS)), generator, dtype) if draw(st.booleans()) else None
    a = [strided((r, full), "plain", generator, dtype) for r in ranks]
    b = [strided((out, r), "plain", generator, dtype) for r in ranks]
    shape = (*leading, sum(spans[1::2]))
    activation = draw(st.sampled_from(ACTIVATIONS))
    operand = strided(shape, draw(st.sampled_from(LAYOUTS)), generator, dtype) if activation == "silu_mul" else None
    residual = strided(shape, draw(st.sampled_from(LAYOUTS)), generator, dtype) if draw(st.booleans()) else None
    return Call(x, weight, bias, a, b, scales, spans, activation, operand, residual)


def example(
    dtype: torch.dtype = torch.float64,
    spans: tuple[int, ...] = (0, 6),
    n: int = 5,
    stages: int = 2,
    layout: str = "plain",
    tokens: tuple[int, ...] = (2, 3),
    bias: bool = True,
    activation: str = "none",
    residual: bool = False,
) -> Call:
    generator = torch.Generator().manual_seed(7)
    shape = (*tokens, sum(spans[1::2]))
    return Call(
        strided((*tokens, n), "plain", generator, dtype),
        strided((10, 8), layout, generator, dtype),
        strided((10,), "plain", generator, dtype) if bias else None,
        [strided((r, 8), "plain", generator, dtype) for r in (3, 2, 4)[:stages]],
        [strided((10, r), "plain", generator, dtype) for r in (3, 2, 4)[:stages]],
        [2.0, 0.5, -1.0][:stages],
        list(spans),
        activation,
        strided(shape, "plain", generator, dtype) if activation == "silu_mul" else None,
        strided(shape, "plain", generator, dtype) if residual else None,
    )


EXAMPLES = {
    "plain": example(),
    "whole": example(spans=(0, 10), n=8),
    "fused": example(spans=(0, 2, 3, 3, 8, 1)),
    "transposed": example(layout="transposed"),
    "fused, transposed": example(spans=(0, 4, 5, 2), layout="transposed"),
    "no bias": example(bias=False),
    "fused, no bias": example(spans=(1, 4, 7, 3), bias=False),
    "no stages": example(stages=0),
    "three stages": example(stages=3),
    "no tokens": example(tokens=(2, 0)),
    "one vector": example(tokens=()),
    "gelu": example(activation="gelu"),
    "tanh gelu, residual": example(activation="gelu_tanh", residual=True),
    "gated, fused": example(activation="silu_mul", spans=(0, 2, 3, 3)),
    "gated, residual, no stages": example(activation="silu_mul", residual=True, stages=0),
}
