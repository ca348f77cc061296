"""The operator against its reference and against a dense product with explicitly sliced and merged weights."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.profiler import profile

from mlfs import MLFSError
from mlfs.ops.layer import ACTIVATIONS, LowRankLinear
from mlfs.ops.sliced_linear import sliced_linear, sliced_linear_reference
from tests.calls import EXAMPLES, calls, example, strided

FORWARD, BACKWARD = torch.ops.mlfs.sliced_linear.default, torch.ops.mlfs.sliced_linear_backward.default


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
    expected = [t.grad for t in dense.leaves]
    assert [g is None for g in gradients] == [g is None for g in expected]
    for g, e in zip(gradients, expected, strict=True):
        if e is not None:
            torch.testing.assert_close(g, e, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("call", EXAMPLES.values(), ids=EXAMPLES.keys())
def test_gradcheck(call):
    stages = tuple(range(len(call.lora_a)))
    call = call.trains(stages=stages)

    def run(*leaves: Tensor) -> Tensor:
        given = iter(leaves)
        tensors = {"x": next(given)}
        tensors |= {name: [next(given) for _ in stages] for name in ("lora_a", "lora_b")}
        tensors |= {name: next(given) for name in ("operand", "residual") if getattr(call, name) is not None}
        return replace(call, **tensors)(sliced_linear)

    assert torch.autograd.gradcheck(run, call.leaves)


@pytest.mark.parametrize("activation, operand", [("relu", False), ("silu_mul", False), ("gelu", True), ("none", True)])
def test_activation_that_does_not_exist_or_fit_its_operand_is_refused(activation, operand):
    call = example()
    call = replace(call, activation=activation, operand=torch.ones(2, 3, 6) if operand else None)
    with pytest.raises(MLFSError, match=r"expected one of none, gelu, gelu_tanh, silu_mul; only silu_mul takes an op"):
        call(sliced_linear)


@pytest.mark.parametrize("call", EXAMPLES.values(), ids=EXAMPLES.keys())
def test_opcheck_of_forward(call):
    torch.library.opcheck(FORWARD, (*call.arguments, False))  # without gradients
    torch.library.opcheck(FORWARD, (*call.trains(stages=(0,)).arguments, True))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("needs_dx", [True, False])
@pytest.mark.parametrize("trains", [(False, False), (True, False), (False, True), (True, True)])
def test_opcheck_of_backward(trains, needs_dx, activation):
    for spans in ((0, 6), (0, 2, 3, 3, 8, 1)):
        call = example(spans=spans, activation=activation)
        dy = torch.ones(2, 3, len(call.rows), dtype=torch.float64)
        x, h = (call.x, torch.ones(6, 5, dtype=torch.float64)) if any(trains) else (None, None)
        z = None if activation == "none" else torch.randn(6, len(call.rows), dtype=torch.float64)
        layer = ([call.weight], call.lora_a, call.lora_b, call.scales, call.spans)
        torch.library.opcheck(BACKWARD, (dy, x, h, z, call.operand, *layer, list(trains), needs_dx, 5, activation))


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
    assert not any(t is not None and t.shape == (2, 3, 5) for t in kept)
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
        sliced_linear(x, LowRankLinear(weight, None, [a], [b], [2.0], spans)).sum().backward()
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
