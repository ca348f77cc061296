"""Several sizes at once: each group's rows equal the single operator's, alone; on the reference and on the kernels."""

from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mlfs import MLFSError
from mlfs.ops.backend import use_backend
from mlfs.ops.grouped_linear import Group, grouped_sliced_linear, grouped_sliced_linear_reference
from mlfs.ops.layer import LowRankLinear, flatten
from tests.calls import strided
from tests.devices import examples, move, on_each_device

OPS = torch.ops.mlfs.grouped_sliced_linear.default, torch.ops.mlfs.grouped_sliced_linear_backward.default


@dataclass(frozen=True)
class Call:
    """Arguments of one call."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    lora_a: list[Tensor]
    lora_b: list[Tensor]
    scales: list[float]
    groups: list[Group]

    def __call__(self, op) -> Tensor:
        return op(self.x, self.layer, self.groups)

    @property
    def layer(self) -> LowRankLinear:
        return LowRankLinear(self.weight, self.bias, self.lora_a, self.lora_b, self.scales, [0, self.weight.shape[0]])

    def leaves(self, dtype: torch.dtype | None = None, device: str = "cpu") -> "Call":
        """The same arguments as new leaves that want gradients; W and b too where another type is asked for."""

        def base(t: Tensor | None) -> Tensor | None:
            return None if t is None else move(t if dtype is None else t.to(dtype), device)

        def leaf(t: Tensor) -> Tensor:
            return move(t.detach().to(dtype or t.dtype), device).requires_grad_()

        a, b = [leaf(t) for t in self.lora_a], [leaf(t) for t in self.lora_b]
        return replace(self, x=leaf(self.x), weight=base(self.weight), bias=base(self.bias), lora_a=a, lora_b=b)

    @property
    def wanted(self) -> list[Tensor]:
        return [self.x, *self.lora_a, *self.lora_b]


@st.composite
def calls(draw, dtype: torch.dtype = torch.float64, tokens: int = 4, size: int = 12, rank: int = 4) -> Call:
    out, full = draw(st.integers(1, size)), draw(st.integers(1, size))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    groups, first = [], 0
    for _ in range(draw(st.integers(0, 4))):
        first += draw(st.integers(0, 2))
        count = draw(st.integers(0, tokens))
        edges = sorted(draw(st.sets(st.integers(0, out), max_size=6)))
        edges = edges[: len(edges) // 2 * 2]
        spans = tuple(n for i in range(0, len(edges), 2) for n in (edges[i], edges[i + 1] - edges[i]))
        groups.append(Group(first, count, draw(st.integers(0, full)), spans))
        first += count
    ranks = draw(st.lists(st.integers(1, rank), max_size=3))
    total = first + draw(st.integers(0, 2))
    x = strided((total, full), draw(st.sampled_from(("plain", "transposed", "inside"))), generator, dtype)
    weight = strided((out, full), draw(st.sampled_from(("plain", "transposed", "inside"))), generator, dtype)
    bias = strided((out,), "every second", generator, dtype) if draw(st.booleans()) else None
    a = [strided((r, full), "plain", generator, dtype) for r in ranks]
    b = [strided((out, r), "plain", generator, dtype) for r in ranks]
    return Call(x, weight, bias, a, b, [2.0, 0.5, -1.25][: len(ranks)], groups)


def example(dtype: torch.dtype = torch.float64) -> Call:
    """Four sizes, a left-out group among them, over a fused projection."""
    generator = torch.Generator().manual_seed(0)
    groups = [
        Group(0, 5, 8, (0, 4, 4, 3, 7, 3)),
        Group(5, 3, 5, (0, 2, 4, 1, 7, 1)),
        Group(8, 2, 6, ()),
        Group(11, 4, 3, (0, 4)),
    ]
    a = [strided((3, 8), "plain", generator, dtype) for _ in range(2)]
    b = [strided((10, 3), "plain", generator, dtype) for _ in range(2)]
    x, weight = strided((16, 8), "plain", generator, dtype), strided((10, 8), "plain", generator, dtype)
    return Call(x, weight, strided((10,), "plain", generator, dtype), a, b, [2.0, 0.5], groups)


def agree(call: Call, tolerance: float, device: str = "cpu") -> None:
    """Result and gradients equal those of the reference in float64, relative to each tensor's size."""
    mine, exact = call.leaves(device=device), call.leaves(torch.float64)
    y, goal = mine(grouped_sliced_linear), exact(grouped_sliced_linear_reference)
    assert y.dtype == call.x.dtype and y.shape == goal.shape
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y.dtype)
    y.backward(dy.to(device))
    goal.backward(dy.double()) if goal.requires_grad else None
    pairs = [(y.detach(), goal.detach())]
    for m, e in zip(mine.wanted, exact.wanted, strict=True):
        pairs.append((m.grad, torch.zeros_like(e) if e.grad is None else e.grad))
    for m, e in pairs:
        scale = max(e.abs().amax().item(), 1.0) if e.numel() else 1.0
        assert e.numel() == 0 or (m.cpu().double() - e).abs().amax().item() <= tolerance * scale


@settings(max_examples=150)
@given(calls())
def test_equals_one_product_after_the_other(call):
    agree(call, 1e-10)


def test_groups_equal_the_reference_and_zeros_surround_them():
    y = example()(grouped_sliced_linear)
    assert not y[10].any() and not y[15].any() and not y[8:10].any()  # in no group, or left out
    assert y[5:8, [0, 1, 4, 7]].all() and not y[5:8, [2, 3, 5, 6, 8, 9]].any()
    assert y[11:15, :4].all() and not y[11:15, 4:].any()


def test_what_lies_off_the_slices_is_not_read():
    call = example().leaves()
    dirty = call.x.detach().clone()
    dirty[5:8, 5:] = float("nan")
    dirty[8:11] = float("inf")
    dirty = replace(call, x=dirty.requires_grad_())
    y = dirty(grouped_sliced_linear)
    assert torch.equal(y, call(grouped_sliced_linear))
    dy = torch.ones_like(y)
    dy[5:8, 9] = float("nan")
    y.backward(dy)
    assert all(t.grad.isfinite().all() for t in dirty.wanted)
    assert not dirty.x.grad[5:8, 5:].any() and not dirty.x.grad[8:11].any()


def test_gradcheck():
    call = example().leaves()

    def run(*tensors: Tensor) -> Tensor:
        return replace(call, x=tensors[0], lora_a=list(tensors[1:3]), lora_b=list(tensors[3:]))(grouped_sliced_linear)

    assert torch.autograd.gradcheck(run, call.wanted)


def test_opcheck():
    call = example().leaves()
    packed = [n for g in call.groups for n in (g.first, g.tokens, g.n, *g.spans, *[0] * (6 - len(g.spans)))]
    torch.library.opcheck(OPS[0], (call.x, *flatten([call.layer]), packed))
    a, b = [t.detach() for t in call.lora_a], [t.detach() for t in call.lora_b]
    for trains in ([True, False], [False, False]):
        x, h = (call.x.detach(), torch.ones(16, 6).double()) if any(trains) else (None, None)
        dy = torch.ones(16, 10).double()
        layer = ([call.weight], a, b, call.scales, [0, 10])
        torch.library.opcheck(OPS[1], (dy, x, h, *layer, packed, trains, True))


@pytest.mark.parametrize(
    "groups",
    [[Group(0, 4, 8, (0, 10)), Group(3, 2, 8, (0, 10))], [Group(0, 17, 8, (0, 10))], [Group(0, 4, 9, (0, 10))],
     [Group(0, 4, 8, (0, 11))], [Group(0, 4, 8, (0, 1, 2, 1, 4, 1, 6, 1))], [Group(-1, 4, 8, (0, 1))]],
    ids=["overlap", "too many tokens", "too wide", "rows that are not there", "four spans", "before the first"],
)  # fmt: skip
def test_groups_that_do_not_fit_are_refused(groups):
    with pytest.raises(MLFSError, match=r"Group\(.*expected tokens after \d+ and within 16"):
        replace(example(), groups=groups)(grouped_sliced_linear)


@on_each_device
class TestKernels:
    """The same on Triton's kernels."""

    @pytest.fixture(autouse=True)
    def kernels(self, poisoned_memory):
        pytest.importorskip("triton")
        with use_backend("triton"):
            yield

    @settings(max_examples=examples(40))
    @given(calls(torch.float32))
    def test_small_and_odd_sizes(self, device, call):
        agree(call, 1e-5, device)

    @settings(max_examples=examples(8))
    @given(calls(torch.float32, tokens=80, size=150, rank=9))
    def test_across_tile_edges(self, device, call):
        agree(call, 1e-5, device)

    @pytest.mark.parametrize("dtype, tolerance", [(torch.float16, 5e-3), (torch.bfloat16, 4e-2)])
    def test_half_precision(self, device, dtype, tolerance):
        agree(example(dtype), tolerance, device)

    def test_what_lies_off_the_slices_is_not_read(self, device):
        call = example(torch.float32).leaves(device=device)
        dirty = call.x.detach().clone()
        dirty[5:8, 5:] = float("nan")
        dirty[8:11] = float("inf")
        dirty = replace(call, x=dirty.requires_grad_())
        y = dirty(grouped_sliced_linear)
        dy = torch.ones_like(y)
        dy[5:8, 9] = float("nan")
        y.backward(dy)
        assert y.isfinite().all() and all(t.grad.isfinite().all() for t in dirty.wanted)

    @pytest.mark.parametrize("rows, columns", [(48, 64), (41, 35)])
    def test_aligned_sizes_in_a_width_that_is_aligned_or_not(self, device, rows, columns):
        """Tables count in units of 16 where all sizes and the full width are multiples of it."""
        generator = torch.Generator().manual_seed(0)
        x, weight = (strided((size, columns), "plain", generator, torch.float32) for size in (8, rows))
        groups = [Group(0, 3, 16, (0, 32)), Group(3, 4, 32, (16, 16))]
        call = Call(x, weight, None, [weight[:2] * 0.1], [weight[:, :2].clone()], [2.0], groups)
        assert not call(grouped_sliced_linear)[:, 32:].any()
        agree(call, 1e-5)

    def test_two_runs_agree_bit_for_bit(self, device):
        def run() -> list[Tensor]:
            call = example(torch.float32).leaves(device=device)
            y = call(grouped_sliced_linear)
            y.backward(torch.ones_like(y))
            return [y, *(t.grad for t in call.wanted)]

        assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))
