"""`Dimensions`: which spaces fit a model, and the space it gets by default."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlfs import MLFSError, SearchSpace, SuperTransformer
from mlfs.space.dimensions import Dimensions
from tests.tiny_models import make

LLAMA = Dimensions(hidden=48, heads=6, kv_heads=3, head_dim=8, ffn=40, layers=4)


def space(**sizes) -> SearchSpace:
    return SearchSpace(**{"hidden": (48,), "heads": (6,), "ffn": (40,), "layers": ((0, 1, 2, 3),), **sizes})


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        (dict(heads=(6, 3)), "heads=3 is not a whole number of groups: 6 query heads share 3 key-value heads, .* of 2"),
        (
            dict(hidden=(96, 48)),
            "the space's hidden is larger than the model: its first choice is 96, the model has 48",
        ),
        (dict(heads=(8, 6)), "the space's heads is larger than the model: its first choice is 8, the model has 6"),
        (dict(ffn=(80, 40)), "the space's ffn is larger than the model: its first choice is 80, the model has 40"),
        (dict(hidden=(32, 16)), "the space's hidden does not start at the full model: .* 32, the model has 48"),
        (dict(layers=((0, 1, 2, 3, 4),)), "the space's layers does not start at the full model"),
        (dict(layers=((0, 1),)), "the space's layers does not start at the full model"),
    ],
)
def test_space_that_does_not_fit_the_model_is_refused(sizes, message):
    with pytest.raises(MLFSError, match=message):
        LLAMA.check(space(**sizes))
    model = make("llama", "ForCausalLM")
    with pytest.raises(MLFSError, match=message):
        SuperTransformer(model, space(**sizes))
    assert not any(type(module).__module__.startswith("mlfs") for module in model.modules())


def test_one_shared_key_value_head_allows_any_number_of_heads():
    dataclasses.replace(LLAMA, kv_heads=1).check(space(heads=(6, 5, 1)))


@given(
    st.integers(1, 12),
    st.integers(1, 8),
    st.integers(1, 16),
    st.integers(1, 512),
    st.integers(1, 40),
    st.integers(0, 99),
)
def test_default_space_fits_every_model(groups, group, head_dim, ffn, layers, odd):
    heads = groups * group
    for hidden in (heads * head_dim, heads * head_dim + odd):
        dims = Dimensions(hidden, heads, groups, head_dim, ffn, layers)
        default = dims.default_space()
        dims.check(default)
        assert all(member in default for member in default.palette().values())


def test_default_space_of_bert_base():
    dims = Dimensions(hidden=768, heads=12, kv_heads=12, head_dim=64, ffn=3072, layers=12)
    default = dims.default_space()
    assert (default.hidden, default.heads, default.ffn) == ((768, 512, 384), (12, 8, 6), (3072, 1536, 768))
    assert default.layers == (12, 6)
