"""The compiled attention for CPUs against the formula in float64, one query after the other."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mlfs.ops.attention import ragged_attention, ragged_attention_reference, ranges_of_keys, ranges_of_sequences
from tests.csrc.helpers import TYPES, close, mask_of


def attend(
    q: Tensor, k: Tensor, v: Tensor, ranges: Tensor, scale: float, causal: bool, p: float = 0.0, seed: int = 0
) -> Tensor:
    """The formula, one query after the other; a query's mask is that of (row, token, head), over its own range."""
    (rows, tokens, heads, _), group = q.shape, q.shape[2] // k.shape[2]
    mask = mask_of((rows * tokens * heads, k.shape[1]), p, seed, torch.float64) if p else None
    found = [[[torch.zeros_like(q[0, 0, 0])] * heads for _ in range(tokens)] for _ in range(rows)]
    for row, start, end, first, last, position in ranges.tolist():
        for i in range(start, end):
            seen = max(min(last, position + i - start + 1), first) if causal else last
            if seen == first:
                continue
            for h in range(heads):
                keys, values = (t[row, first:seen, h // group] for t in (k, v))
                weights = torch.softmax(scale * (keys @ q[row, i, h]), 0)
                if mask is not None:
                    weights = weights * mask[(row * tokens + i) * heads + h, : seen - first]
                found[row][i][h] = weights @ values
    return torch.stack([torch.stack([torch.stack(h) for h in row]) for row in found])


@st.composite
def some_ranges(draw) -> tuple[int, int, int, Tensor]:
    """(rows, tokens, keys, ranges)."""
    rows, lines, tokens, keys = draw(st.integers(1, 3)), [], 1, 1
    for row in range(rows):
        i = j = 0
        for _ in range(draw(st.integers(0, 2))):
            start, first = i + draw(st.integers(0, 2)), j + draw(st.integers(0, 3))
            i, j = start + draw(st.integers(0, 80)), first + draw(st.integers(0, 40))
            lines.append((row, start, i, first, j, draw(st.integers(0, 30))))
        tokens, keys = max(tokens, i), max(keys, j)
    return rows, tokens, keys, torch.tensor(lines, dtype=torch.long).view(-1, 6)


@TYPES
@pytest.mark.parametrize("p", [0.0, 0.4])
@settings(max_examples=25)
@given(
    shape=some_ranges(),
    heads=st.integers(1, 2),
    group=st.integers(1, 3),
    dim=st.integers(1, 40),
    causal=st.booleans(),
    seed=st.integers(0, 2**62),
)
def test_attention_equals_the_formula(dtype, p, shape, heads, group, dim, causal, seed):
    rows, tokens, keys, ranges = shape
    generator = torch.Generator().manual_seed(seed % 2**31)
    layouts = [(rows, tokens, heads * group, dim)] + [(rows, heads, keys, dim)] * 2  # keys as a cache has them
    q, k, v = (torch.randn(layout, generator=generator, dtype=dtype) for layout in layouts)
    d_o = torch.randn(q.shape, generator=generator, dtype=dtype)
    mine = [t.clone().requires_grad_() for t in (q, k, v)]
    exact = [t.double().clone().requires_grad_() for t in (q, k, v)]
    turned = [[t[0], t[1].transpose(1, 2), t[2].transpose(1, 2)] for t in (mine, exact)]
    o = ragged_attention(*turned[0], ranges, 0.3, causal, p, seed)
    goal = attend(*turned[1], ranges, 0.3, causal, p, seed)
    close(o.detach(), goal.detach(), dtype)
    with torch.no_grad():
        assert torch.equal(ragged_attention(*turned[0], ranges, 0.3, causal, p, seed), o)
    if not p:
        close(ragged_attention_reference(*turned[1], ranges, 0.3, causal).detach(), goal.detach(), torch.float64)
    o.backward(d_o)
    (goal * d_o.double()).sum().backward() if goal.requires_grad else None
    for a, b in zip(mine, exact, strict=True):
        close(a.grad, torch.zeros_like(b) if b.grad is None else b.grad, dtype, scale=4)


def test_attention_reads_the_parts_of_one_tensor_and_large_scores():
    generator = torch.Generator().manual_seed(0)
    fused = torch.randn(1, 30, 3, 2, 24, generator=generator, dtype=torch.float64) * 30
    ranges = ranges_of_sequences([11, 30])
    o = ragged_attention(*fused.unbind(2), ranges, 1.0)
    expected = ragged_attention_reference(*fused.unbind(2), ranges, 1.0)
    torch.testing.assert_close(o, expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(
        ragged_attention(*fused.float().unbind(2), ranges, 1.0).double(), expected, rtol=1e-3, atol=0.1
    )


def test_opcheck_of_attention():
    q, k, v = (torch.randn(2, 9, heads, 5, dtype=torch.float64, requires_grad=True) for heads in (4, 2, 2))
    ranges = ranges_of_keys([(0, 9), (3, 8)], 9)
    torch.library.opcheck(torch.ops.mlfs.ragged_attention.default, (q, k, v, ranges, 0.5, True, 0.1, 3))
    assert torch.autograd.gradcheck(lambda *t: ragged_attention(*t, ranges, 0.5, True, 0.3, 9), (q, k, v))


@pytest.mark.parametrize(
    ("lines", "reason"),
    [
        ([(0, 0, 10, 0, 9, 0)], "range 0 is outside"),
        ([(0, 0, 9, 0, 10, 0)], "range 0 is outside"),
        ([(1, 0, 9, 0, 9, 0)], "range 0 is outside"),
        ([(0, 5, 4, 0, 9, 0)], "range 0 is outside"),
        ([(0, 0, 5, 0, 5, 0), (0, 5, 9, 4, 9, 0)], "range 1 overlaps"),
        ([(0, 5, 9, 5, 9, 0), (0, 0, 5, 0, 5, 0)], "range 1 overlaps"),
    ],
)
def test_ranges_that_do_not_fit_are_refused(lines, reason):
    q = torch.randn(1, 9, 2, 4)
    with pytest.raises(RuntimeError, match=reason):
        ragged_attention(q, q, q, torch.tensor(lines), 1.0)
    with pytest.raises(RuntimeError, match="attention of q"):
        ragged_attention(q, q[:, :, :1, :3], q[:, :, :1, :3], torch.tensor(lines), 1.0)
