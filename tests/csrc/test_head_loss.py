"""The compiled loss of a language model's head against the formula in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mlfs.ops.head_loss import IGNORED, head_loss, head_loss_reference
from tests.csrc.helpers import TYPES, close


@TYPES
@settings(max_examples=40)
@given(data=st.data())
def test_the_loss_of_a_head_equals_the_formula(dtype, data):
    tokens, n, vocabulary = data.draw(st.integers(0, 9)), data.draw(st.integers(1, 20)), data.draw(st.integers(1, 90))
    temperature, smoothing = data.draw(st.sampled_from([1.0, 2.5])), data.draw(st.sampled_from([0.0, 0.2]))
    alpha, teaches, far = data.draw(st.floats(0, 1)), data.draw(st.booleans()), data.draw(st.sampled_from([1, 40]))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))

    def some(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=dtype) * far

    x, weight, bias = some(tokens, n), some(vocabulary, n + 2) / far, some(vocabulary)
    labels = torch.randint(-1, vocabulary, (tokens,), generator=generator)
    labels[labels < 0] = IGNORED
    teacher = some(tokens, n + 2) if teaches else None
    outcomes = []
    for kind, op in ((dtype, head_loss), (torch.float64, head_loss_reference)):
        mine = x.detach().to(kind).requires_grad_()
        more = [None if t is None else t.to(kind) for t in (weight, bias, teacher)]
        sums = op(mine, more[0], more[1], labels, more[2], alpha, temperature, smoothing)
        sums[0].backward()
        outcomes.append([*(t.detach() for t in sums), mine.grad])
    for a, b in zip(*outcomes, strict=True):
        close(a, b.double(), dtype, scale=20)


def test_a_label_outside_of_the_vocabulary_is_refused():
    x, weight = torch.randn(3, 4, requires_grad=True), torch.randn(7, 4)
    for wrong in (7, -1):
        with pytest.raises(IndexError, match=f"label {wrong} of a vocabulary of 7"):
            head_loss(x, weight, None, torch.tensor([0, wrong, 1]))
