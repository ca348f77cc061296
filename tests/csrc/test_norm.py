"""The compiled norms for CPUs, and the masks of their dropout, against formulas in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mlfs.ops.attention import ragged_attention, ranges_of_sequences
from mlfs.ops.layer import LowRankLinear
from mlfs.ops.sliced_linear import sliced_linear
from tests.calls import strided
from tests.csrc.helpers import TYPES, close, cpu, mask_of
from tests.helpers.norms import add_norm, add_norm_reference


@TYPES
@settings(max_examples=80)
@given(data=st.data())
def test_norms_equal_the_formula(dtype, data):
    n, leading = data.draw(st.integers(2, 150)), tuple(data.draw(st.lists(st.integers(0, 5), max_size=3)))
    rms, p = data.draw(st.booleans()), data.draw(st.sampled_from([0.0, 0.0, 0.3]))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    layouts = st.sampled_from(["plain", "inside", "transposed", "expanded"])
    shapes = {"x": (*leading, n), "residual": (*leading, n), "weight": (n + 2,), "bias": (n + 2,)}
    given_ = {k: strided(shape, data.draw(layouts), generator, dtype) for k, shape in shapes.items()}
    given_["x"] = given_["x"] * 3 + 1
    for name in ("residual", "weight", "bias"):
        if data.draw(st.booleans()):
            given_[name] = None
    mine = {k: None if t is None else t.detach().requires_grad_() for k, t in given_.items()}
    exact = {k: None if t is None else t.detach().double().requires_grad_() for k, t in given_.items()}
    seed = 12345678901234
    y, s = add_norm(**mine, eps=1e-5, rms=rms, p=p, seed=torch.tensor([seed]))
    dropped = exact | {"x": exact["x"] * mask_of(given_["x"].shape, p, seed, torch.float64)} if p else exact
    goal, carried = add_norm_reference(**dropped, eps=1e-5, rms=rms)
    close(y.detach(), goal.detach(), dtype, scale=10)
    close(s.detach(), carried.detach(), dtype)
    dy, ds = (torch.randn(y.shape, generator=generator, dtype=dtype) for _ in range(2))
    ((y * dy).sum() + (s * ds).sum()).backward()
    ((goal * dy.double()).sum() + (carried * ds.double()).sum()).backward()
    for key, leaf in mine.items():
        if leaf is not None:
            close(leaf.grad, exact[key].grad, dtype, scale=50)


def test_masks_are_philox_and_independent():
    """The first numbers are those of Philox 4x32-10: known answers for key and counter zero, of Random123."""
    mask = cpu.dropout_mask(500, 333, 0.25, 7)
    assert set(mask.unique().tolist()) == {0.0, torch.tensor(1 / 0.75).item()}
    kept = mask.bool().float()
    assert abs(kept.mean().item() - 0.75) < 0.005
    for a, b in ((kept[:, 1:], kept[:, :-1]), (kept[1:], kept[:-1]), (kept[:, 16:], kept[:, :-16])):
        assert abs((a * b).mean().item() - 0.75**2) < 0.01
    assert not torch.equal(mask, cpu.dropout_mask(500, 333, 0.25, 8))
    # 0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8: outputs 0 to 3 of counter 0 stand at columns 0, 16, 32 and 48
    for column, word in zip((0, 16, 32, 48), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8), strict=True):
        for p in (word - 2**10, word + 2**10):
            kept_here = cpu.dropout_mask(1, 64, p / 2**32, 0)[0, column].item() > 0
            assert kept_here == (p <= word)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_results_do_not_depend_on_the_threads(threads):
    generator = torch.Generator().manual_seed(0)
    x, residual = (torch.randn(300, 130, generator=generator) for _ in range(2))
    weight, dy = torch.randn(130, generator=generator), torch.randn(300, 130, generator=generator)
    qkv = torch.randn(3, 1, 300, 4, 16, generator=generator)
    ranges = ranges_of_sequences([40, 41, 200, 300])
    a, b = torch.randn(8, 130, generator=generator), torch.randn(140, 8, generator=generator)
    w = torch.randn(140, 130, generator=generator)

    def run() -> list[Tensor]:
        leaves = [x.clone().requires_grad_(), weight.clone().requires_grad_()]
        y, _ = add_norm(leaves[0], residual, leaves[1], None, 1e-5, False, 0.2, torch.tensor([5]))
        y.backward(dy)
        parts = [t.clone().requires_grad_() for t in qkv]
        o = ragged_attention(*parts, ranges, 0.25, True, 0.2, 6)
        o.square().sum().backward()
        stage = [x.clone().requires_grad_(), a.clone().requires_grad_(), b.clone().requires_grad_()]
        z = sliced_linear(stage[0], LowRankLinear(w, None, [stage[1]], [stage[2]], [1.5], [0, 140]))
        z.square().sum().backward()
        return [y.detach(), o.detach(), z.detach(), *(leaf.grad for leaf in (*leaves, *parts, *stage))]

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    expected = run()
    torch.set_num_threads(threads)
    try:
        for a, b in zip(run(), expected, strict=True):
            assert torch.equal(a, b)
    finally:
        torch.set_num_threads(before)
