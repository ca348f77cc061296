"""Norms over the leading numbers, against their formulas and against the modules they stand for."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from mlfs.ops.norm import layer_norm, rms_norm

EPS = 1e-5


def data(full: int, n: int, leading: tuple[int, ...], seed: int, layout: str = "plain") -> tuple[Tensor, ...]:
    """x (..., n), weight and bias (full,), float64."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64)

    x = randn(*leading, 2 * n)[..., ::2] if layout == "strided" else randn(*leading, n)
    if layout == "transposed" and leading:
        x = randn(*leading[:-1], n, leading[-1]).transpose(-1, -2)
    return x * 3 + 1, randn(full), randn(full)


@st.composite
def cases(draw) -> tuple[Tensor, ...]:
    full = draw(st.integers(1, 20))
    leading = tuple(draw(st.lists(st.integers(0, 4), max_size=3)))
    layout = draw(st.sampled_from(["plain", "strided", "transposed"]))
    return data(full, draw(st.integers(1, full)), leading, draw(st.integers(0, 2**31)), layout)


@given(cases(), st.booleans(), st.booleans())
def test_layer_norm_is_its_formula(case, with_weight, with_bias):
    x, weight, bias = case
    y = layer_norm(x, weight if with_weight else None, bias if with_bias else None, EPS)
    n = x.shape[-1]
    mean = x.sum(-1, keepdim=True) / n
    expected = (x - mean) / torch.sqrt(((x - mean) ** 2).sum(-1, keepdim=True) / n + EPS)
    expected = expected * weight[:n] if with_weight else expected
    expected = expected + bias[:n] if with_bias else expected
    torch.testing.assert_close(y, expected, rtol=1e-9, atol=1e-9)


@given(cases())
def test_rms_norm_is_its_formula(case):
    x, weight, _ = case
    n = x.shape[-1]
    expected = x / torch.sqrt((x**2).sum(-1, keepdim=True) / n + EPS) * weight[:n]
    torch.testing.assert_close(rms_norm(x, weight, EPS), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("n", [24, 16, 1])
@pytest.mark.usefixtures("reference")
def test_layer_norm_equals_torchs_module_of_that_width_bit_for_bit(n, dtype):
    x, weight, bias = (t.to(dtype) for t in data(24, n, (3, 5), 0))
    module = nn.LayerNorm(n, EPS).to(dtype)
    module.weight.data, module.bias.data = weight[:n], bias[:n]
    assert torch.equal(layer_norm(x, weight, bias, EPS), module(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("n", [24, 16, 1])
@pytest.mark.usefixtures("reference")
def test_rms_norm_equals_llamas_module_of_that_width_bit_for_bit(n, dtype):
    x, weight, _ = (t.to(dtype) for t in data(24, n, (3, 5), 0))
    module = LlamaRMSNorm(n, EPS).to(dtype)
    module.weight.data = weight[:n]
    assert torch.equal(rms_norm(x, weight, EPS, torch.float32), module(x))
    assert dtype == torch.float64 or torch.equal(rms_norm(x, weight, EPS), module(x))


def test_rms_norm_of_half_precision_measures_in_fp32():
    x = torch.full((4,), 300.0, dtype=torch.float16)  # whose square is no float16
    assert torch.equal(rms_norm(x, torch.ones(4, dtype=torch.float16), EPS), torch.ones(4, dtype=torch.float16))


@pytest.mark.parametrize("n", [6, 4])
def test_gradcheck(n):
    x, weight, bias = (t.requires_grad_() for t in data(6, n, (2, 3), 0))
    assert torch.autograd.gradcheck(lambda *args: layer_norm(*args, EPS), (x, weight, bias))
    assert torch.autograd.gradcheck(lambda *args: rms_norm(*args, EPS), (x, weight))


def test_numbers_off_the_slice_get_no_gradient():
    x, weight, bias = (t.requires_grad_() for t in data(6, 4, (2, 3), 0))
    (layer_norm(x, weight, bias, EPS) + rms_norm(x, weight, EPS)).square().sum().backward()
    assert weight.grad[:4].all() and not weight.grad[4:].any()
    assert bias.grad[:4].all() and not bias.grad[4:].any()


@pytest.mark.parametrize("leading", [(0,), (0, 3), (3, 0)])
def test_no_tokens_give_no_rows(leading):
    x, weight, bias = (t.requires_grad_() for t in data(6, 4, leading, 0))
    for y in (layer_norm(x, weight, bias, EPS), rms_norm(x, weight, EPS)):
        assert y.shape == (*leading, 4)
        y.sum().backward()
    assert not weight.grad.any()


@pytest.mark.usefixtures("reference")
def test_autocast_gives_what_the_modules_give():
    x, weight, bias = (t.float() for t in data(24, 16, (3, 5), 0))
    layer, rms = nn.LayerNorm(16, EPS), LlamaRMSNorm(16, EPS)
    layer.weight.data, layer.bias.data, rms.weight.data = weight[:16], bias[:16], weight[:16]
    for value in (x, x.bfloat16()):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            pairs = [(layer_norm(value, weight, bias, EPS), layer(value)), (rms_norm(value, weight, EPS), rms(value))]
        for mine, right in pairs:
            assert mine.dtype == right.dtype and torch.equal(mine, right)
