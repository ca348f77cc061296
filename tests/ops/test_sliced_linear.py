"""The operator against its reference and against a dense product with explicitly sliced and merged weights."""

from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.profiler import profile

from mlfs.ops.sliced_linear import sliced_linear, sliced_linear_reference

FORWARD, BACKWARD = torch.ops.mlfs.sliced_linear.default, torch.ops.mlfs.sliced_linear_backward.default


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

    def __call__(self, op) -> Tensor:
        return op(self.x, self.weight, self.bias, self.lora_a, self.lora_b, self.scales, self.spans)

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
        return y if self.bias is None else y + self.bias.double()[self.rows]

    def trains(self, x: bool = True, stages: tuple[int, ...] = ()) -> "Call":
        """The same arguments as new leaves, of which x and the adapters of `stages` want gradients."""

        def leaf(t: Tensor, wants: bool) -> Tensor:
            return t.detach().requires_grad_(wants)

        a = [leaf(t, s in stages) for s, t in enumerate(self.lora_a)]
        b = [leaf(t, s in stages) for s, t in enumerate(self.lora_b)]
        return replace(self, x=leaf(self.x, x), lora_a=a, lora_b=b)

    def gradients(self, op, dy: Tensor) -> list[Tensor | None]:
        self(op).backward(dy)
        return [t.grad for t in (self.x, *self.lora_a, *self.lora_b)]


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
def calls(draw, dtype: torch.dtype = torch.float64, tokens: int = 5) -> Call:
    out, full = draw(st.integers(1, 12)), draw(st.integers(1, 12))
    n = draw(st.integers(1, full))
    leading = tuple(draw(st.lists(st.integers(0, tokens), max_size=3)))
    # Spans lie in order and apart, as the parts of a fused projection do.
    edges = sorted(draw(st.sets(st.integers(0, out), min_size=2, max_size=6)))
    edges = edges[: len(edges) // 2 * 2]
    spans = [number for i in range(0, len(edges), 2) for number in (edges[i], edges[i + 1] - edges[i])]
    ranks = draw(st.lists(st.integers(1, 4), max_size=3))
    scales = [draw(st.sampled_from([2.0, 0.5, -1.25])) for _ in ranks]
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    x = strided((*leading, n), draw(st.sampled_from((*LAYOUTS, "expanded"))), generator, dtype)
    weight = strided((out, full), draw(st.sampled_from(LAYOUTS)), generator, dtype)
    bias = strided((out,), draw(st.sampled_from(LAYOUTS)), generator, dtype) if draw(st.booleans()) else None
    a = [strided((r, full), "plain", generator, dtype) for r in ranks]
    b = [strided((out, r), "plain", generator, dtype) for r in ranks]
    return Call(x, weight, bias, a, b, scales, spans)


def example(
    dtype: torch.dtype = torch.float64,
    spans: tuple[int, ...] = (0, 6),
    n: int = 5,
    stages: int = 2,
    layout: str = "plain",
    tokens: tuple[int, ...] = (2, 3),
    bias: bool = True,
) -> Call:
    generator = torch.Generator().manual_seed(7)
    return Call(
        strided((*tokens, n), "plain", generator, dtype),
        strided((10, 8), layout, generator, dtype),
        strided((10,), "plain", generator, dtype) if bias else None,
        [strided((r, 8), "plain", generator, dtype) for r in (3, 2, 4)[:stages]],
        [strided((10, r), "plain", generator, dtype) for r in (3, 2, 4)[:stages]],
        [2.0, 0.5, -1.0][:stages],
        list(spans),
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
}


@settings(max_examples=200)
@given(calls())
def test_equals_the_reference_and_the_dense_product(call):
    y = call(sliced_linear)
    assert y.shape == (*call.x.shape[:-1], len(call.rows))
    torch.testing.assert_close(y, call.dense(), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(call(sliced_linear_reference), call.dense(), rtol=1e-10, atol=1e-10)


@settings(max_examples=200)
@given(calls(), st.data())
def test_gradients_equal_autograds_through_the_dense_product(call, data):
    stages = tuple(data.draw(st.sets(st.integers(0, 2))))
    needs_dx = data.draw(st.booleans())
    ours, dense = call.trains(needs_dx, stages), call.trains(needs_dx, stages)
    y = ours(sliced_linear)
    assert y.requires_grad == (needs_dx or any(s < len(call.lora_a) for s in stages))
    if not y.requires_grad:
        return
    generator = torch.Generator().manual_seed(1)
    dy = torch.randn(y.shape, generator=generator, dtype=y.dtype)
    gradients = ours.gradients(sliced_linear, dy)
    dense.dense().backward(dy)
    expected = [t.grad for t in (dense.x, *dense.lora_a, *dense.lora_b)]
    assert [g is None for g in gradients] == [g is None for g in expected]
    for g, e in zip(gradients, expected, strict=True):
        if e is not None:
            torch.testing.assert_close(g, e, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("call", EXAMPLES.values(), ids=EXAMPLES.keys())
def test_gradcheck(call):
    stages = tuple(range(len(call.lora_a)))
    call = call.trains(stages=stages)

    def run(x: Tensor, *adapters: Tensor) -> Tensor:
        half = len(adapters) // 2
        return replace(call, x=x, lora_a=list(adapters[:half]), lora_b=list(adapters[half:]))(sliced_linear)

    assert torch.autograd.gradcheck(run, (call.x, *call.lora_a, *call.lora_b))


@pytest.mark.parametrize("call", EXAMPLES.values(), ids=EXAMPLES.keys())
def test_opcheck_of_forward(call):
    call = call.trains(stages=(0,))
    arguments = call.x, call.weight, call.bias, call.lora_a, call.lora_b, call.scales, call.spans
    torch.library.opcheck(FORWARD, arguments)


@pytest.mark.parametrize("needs_dx", [True, False])
@pytest.mark.parametrize("trains", [(False, False), (True, False), (False, True), (True, True)])
def test_opcheck_of_backward(trains, needs_dx):
    for spans in ((0, 6), (0, 2, 3, 3, 8, 1)):
        call = example(spans=spans)
        dy = torch.ones(2, 3, len(call.rows), dtype=torch.float64)
        x = call.x if any(trains) else None
        torch.library.opcheck(
            BACKWARD,
            (dy, x, call.weight, call.lora_a, call.lora_b, call.scales, call.spans, list(trains), needs_dx, 5),
        )


@pytest.mark.parametrize("op", [sliced_linear, sliced_linear_reference])
@pytest.mark.parametrize("tokens", [(0,), (0, 3), (3, 0)])
def test_no_tokens_give_no_rows_and_zero_gradients(op, tokens):
    call = example(tokens=tokens, spans=(0, 2, 3, 3)).trains(stages=(0, 1))
    y = call(op)
    assert y.shape == (*tokens, 5)
    y.sum().backward()
    assert call.x.grad is not None and call.x.grad.shape == call.x.shape
    for t in (*call.lora_a, *call.lora_b):
        assert t.grad is not None and not t.grad.any()


def test_frozen_weight_and_bias_get_no_gradient():
    call = example().trains(stages=(0,))
    call.weight.requires_grad_()
    call.bias.requires_grad_()
    call(sliced_linear).sum().backward()
    assert call.weight.grad is None and call.bias.grad is None
    assert call.lora_a[0].grad is not None


def test_only_stages_that_train_get_gradients():
    call = example(stages=3).trains(stages=(1,))
    call(sliced_linear).sum().backward()
    assert [t.grad is not None for t in call.lora_a] == [False, True, False]
    assert [t.grad is not None for t in call.lora_b] == [False, True, False]


def test_gradients_are_zero_off_the_slice():
    call = example(spans=(1, 2, 6, 3)).trains(stages=(0, 1))
    call(sliced_linear).sum().backward()
    off = [row for row in range(10) if row not in call.rows]
    for a, b in zip(call.lora_a, call.lora_b, strict=True):
        assert not a.grad[:, 5:].any() and a.grad[:, :5].all()
        assert not b.grad[off].any() and b.grad[call.rows].all()


def test_a_frozen_layer_keeps_no_activations_for_the_backward_pass():
    kept = example().trains(stages=())(sliced_linear).grad_fn.saved_tensors
    assert not any(t.shape == (2, 3, 5) for t in kept)
    kept = example().trains(stages=(1,))(sliced_linear).grad_fn.saved_tensors
    assert any(t.shape == (2, 3, 5) for t in kept)


@pytest.mark.parametrize("layout", ["plain", "transposed"])
@pytest.mark.parametrize("spans", [(0, 1500), (0, 500, 700, 500, 1400, 500)])
def test_weight_is_read_in_place(layout, spans):
    generator = torch.Generator().manual_seed(0)
    weight = strided((2048, 1024), layout, generator, torch.float32)
    a, b = torch.randn(4, 1024, requires_grad=True), torch.randn(2048, 4, requires_grad=True)
    x = torch.randn(2, 1000, requires_grad=True)
    with profile(profile_memory=True) as recorded:
        sliced_linear(x, weight, None, [a], [b], [2.0], spans).sum().backward()
    allocated = [event.nbytes() for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    assert 0 < max(allocated) < 1000 * 1500 * 4 / 10


@pytest.mark.parametrize("spans", [(0, 6), (0, 2, 3, 3)])
@pytest.mark.parametrize("op", [sliced_linear, sliced_linear_reference])
def test_fp32_adapters_over_a_bf16_base(op, spans):
    call = example(torch.float32, spans)
    half = replace(call, weight=call.weight.bfloat16(), bias=call.bias.bfloat16())
    y = half(op)
    assert y.dtype == torch.float32
    torch.testing.assert_close(y.double(), half.dense(), rtol=1e-5, atol=1e-5)
    low = replace(half, x=call.x.bfloat16()).trains(stages=(0,))
    y = low(op)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.double(), low.dense(), rtol=2e-2, atol=0.3)
    y.float().square().sum().backward()
    exact = low.trains(stages=(0,))
    exact.dense().square().sum().backward()
    assert (low.lora_a[0].grad.dtype, low.lora_b[0].grad.dtype, low.x.grad.dtype) == (
        torch.float32, torch.float32, torch.bfloat16
    )  # fmt: skip
    for mine, right in zip((low.lora_a[0], low.lora_b[0]), (exact.lora_a[0], exact.lora_b[0]), strict=True):
        assert (mine.grad - right.grad).norm() < 0.03 * right.grad.norm()


@pytest.mark.parametrize("op", [sliced_linear, sliced_linear_reference])
def test_autocast_computes_in_bf16_and_returns_fp32_gradients(op):
    call = example(torch.float32).trains(stages=(0, 1))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = call(op)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.double(), call.dense(), rtol=2e-2, atol=0.3)
    y.float().square().sum().backward()
    exact = call.trains(stages=(0, 1))
    exact.dense().square().sum().backward()
    for mine, right in zip((call.x, *call.lora_a, *call.lora_b), (exact.x, *exact.lora_a, *exact.lora_b), strict=True):
        assert mine.grad.dtype == torch.float32
        assert (mine.grad - right.grad).norm() < 0.03 * right.grad.norm()


def test_reference_trains_weight_and_bias():
    """The road of task heads and of layers trained from scratch."""
    call = example(spans=(0, 2, 3, 3))
    call.weight.requires_grad_()
    call.bias.requires_grad_()
    call(sliced_linear_reference).sum().backward()
    expected = torch.zeros(10, 8, dtype=torch.float64)
    expected[call.rows, :5] = call.x.sum((0, 1))
    torch.testing.assert_close(call.weight.grad, expected)
    assert call.bias.grad.tolist() == [6.0 if row in call.rows else 0.0 for row in range(10)]
