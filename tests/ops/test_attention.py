"""Attention within ranges is asked for where the extension for CPUs computes it."""

from types import SimpleNamespace

import pytest
import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

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
@pytest.mark.parametrize("unwritten", [0, 4])
@pytest.mark.parametrize("tokens", [1, 2, 5])
def test_causal_attention_is_what_transformers_means_by_no_mask(backend, tokens, unwritten):
    """Keys beyond the queries are those of a cache of a fixed length; a single query goes on from a past."""
    if backend == "cpp":
        pytest.importorskip("mlfs._cpu", reason="the C++ extension is not built")
    generator = torch.Generator().manual_seed(unwritten)
    q = torch.randn(2, 6, tokens, 8, generator=generator)
    k, v = (torch.randn(2, 3, tokens + unwritten, 8, generator=generator) for _ in range(2))
    module = SimpleNamespace(is_causal=True, num_key_value_groups=2, training=False)
    expected, _ = ALL_ATTENTION_FUNCTIONS["sdpa"](module, q, k, v, None, scaling=0.3)
    with use_backend(backend):
        torch.testing.assert_close(causal_attention(q, k, v, 0.3), expected)
