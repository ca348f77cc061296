"""Attention within ranges is asked for where the extension for CPUs computes it."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from mlfs.ops.attention import autocasts, causal_attention, takes_ranges
from mlfs.ops.backend import use_backend


def test_ranges_are_taken_by_the_extension_alone():
    pytest.importorskip("mlfs._cpu", reason="the C++ extension is not built")
    x = torch.ones(2, 3)
    assert takes_ranges(x) and takes_ranges(x, x)
    assert not takes_ranges(x.bfloat16())
    assert not takes_ranges(x, x.bfloat16())
    with use_backend("reference"):
        assert not takes_ranges(x)


def test_autocast_is_told():
    x = torch.ones(2, 3)
    assert not autocasts(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert autocasts(x)


@pytest.mark.parametrize("backend", ["reference", "cpp"])
@pytest.mark.parametrize("past", [0, 4])
def test_causal_attention_sees_the_keys_before_and_no_others(backend, past):
    if backend == "cpp":
        pytest.importorskip("mlfs._cpu", reason="the C++ extension is not built")
    generator = torch.Generator().manual_seed(past)
    q = torch.randn(2, 6, 5, 8, generator=generator)
    k, v = (torch.randn(2, 3, 5 + past, 8, generator=generator) for _ in range(2))
    seen = torch.ones(5, 5 + past, dtype=torch.bool).tril(past)
    expected = scaled_dot_product_attention(q, k, v, seen, scale=0.3, enable_gqa=True).transpose(1, 2)
    with use_backend(backend):
        torch.testing.assert_close(causal_attention(q, k, v, 0.3), expected)
