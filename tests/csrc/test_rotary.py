"""The compiled rotary embeddings for CPUs against the formula in float64."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mlfs.ops.rotary import rotary, rotary_reference
from tests.calls import strided
from tests.csrc.helpers import TYPES, close


@TYPES
@settings(max_examples=40)
@given(data=st.data())
def test_rotary_embeddings_equal_the_formula(dtype, data):
    rows, tokens, heads, kv_heads = (data.draw(st.integers(0, 4)) for _ in range(4))
    dim, shared = 2 * data.draw(st.integers(1, 25)), data.draw(st.booleans())
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    layouts = st.sampled_from(["plain", "inside", "transposed", "expanded"])
    shapes = [(rows, tokens, heads, dim), (rows, tokens, kv_heads, dim), *[(1 if shared else rows, tokens, dim)] * 2]
    given_ = [strided(shape, data.draw(layouts), generator, dtype) for shape in shapes]
    mine = [t.detach().clone().requires_grad_() for t in given_[:2]]
    exact = [t.detach().double().requires_grad_() for t in given_[:2]]
    found, goal = rotary(*mine, *given_[2:]), rotary_reference(*exact, *(t.double() for t in given_[2:]))
    with torch.no_grad():
        direct = rotary(*given_)
    for a, b, c in zip(found, direct, goal, strict=True):
        close(a.detach(), c.detach(), dtype)
        assert torch.equal(a, b)
    slopes = [torch.randn(t.shape, generator=generator, dtype=dtype) for t in found]
    torch.autograd.backward(found, slopes)
    torch.autograd.backward(goal, [t.double() for t in slopes])
    for a, b in zip(mine, exact, strict=True):
        close(a.grad, b.grad, dtype)
