"""The rotary operator, on its reference and on its kernel, against the formula in float64 and against transformers."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from mlfs import MLFSError
from mlfs.ops.backend import use_backend
from mlfs.ops.rotary import rotary, rotary_reference
from tests.calls import LAYOUTS, strided
from tests.devices import examples, move, on_each_device

pytestmark = [on_each_device, pytest.mark.usefixtures("poisoned_memory")]
OP = torch.ops.mlfs.rotary.default
BACKENDS = ["reference", "triton"]


@pytest.fixture(params=BACKENDS)
def backend(request):
    """Either backend."""
    if request.param == "triton":
        pytest.importorskip("triton")
    with use_backend(request.param):
        yield request.param


def case(
    rows: int = 2, tokens: int = 5, heads: tuple[int, int] = (6, 2), dim: int = 8, shared: bool = True, seed: int = 0,
    layouts: tuple[str, str, str] = ("plain",) * 3, dtype: torch.dtype = torch.float32,
    of_angles: torch.dtype | None = None,
) -> list[Tensor]:  # fmt: skip
    """q, k, cos and sin; the halves of cos and sin are not the same, as no formula here says they are."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(rows, tokens, count, dim) for count in heads] + [(1 if shared else rows, tokens, dim)] * 2
    kinds = [dtype] * 2 + [of_angles or dtype] * 2
    return [strided(shape, layout, generator, kind)
            for shape, layout, kind in zip(shapes, (*layouts, layouts[2]), kinds, strict=True)]  # fmt: skip


@st.composite
def cases(draw) -> list[Tensor]:
    rows, tokens, dim = draw(st.integers(0, 3)), draw(st.integers(0, 4)), 2 * draw(st.integers(1, 9))
    heads = draw(st.integers(0, 40)), draw(st.integers(0, 5))
    layouts = tuple(draw(st.sampled_from((*LAYOUTS, "expanded"))) for _ in range(3))
    return case(rows, tokens, heads, dim, draw(st.booleans()), draw(st.integers(0, 2**31)), layouts)


def agree(given_: list[Tensor], tolerance: float, device: str) -> None:
    q, k = (move(t, device).requires_grad_() for t in given_[:2])
    exact = [t.detach().double().requires_grad_(i < 2) for i, t in enumerate(given_)]
    out, goal = rotary(q, k, *(move(t, device) for t in given_[2:])), rotary_reference(*exact)
    generator = torch.Generator().manual_seed(1)
    back = [strided(t.shape, "transposed", generator, torch.float64) for t in goal]
    torch.autograd.backward(out, [d.to(t.dtype).to(device) for d, t in zip(back, out, strict=True)])
    torch.autograd.backward(goal, back)
    for mine, right in zip((*out, q.grad, k.grad), (*goal, exact[0].grad, exact[1].grad), strict=True):
        assert mine.shape == right.shape
        largest = max(right.abs().amax().item(), 1.0) if right.numel() else 1.0
        assert right.numel() == 0 or (mine.detach().cpu().double() - right).abs().amax().item() <= tolerance * largest


@settings(max_examples=examples(40))
@given(given_=cases())
@pytest.mark.parametrize("name", BACKENDS)
def test_equals_the_formula(device, name, given_):
    if name == "triton":
        pytest.importorskip("triton")
    with use_backend(name):
        agree(given_, 1e-6, device)


@pytest.mark.parametrize("heads, dim", [((32, 32), 128), ((9, 3), 64), ((33, 1), 256), ((1, 4), 2)])
def test_across_heads_and_sizes(device, backend, heads, dim):
    agree(case(1, 3, heads, dim), 1e-6, device)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float16, 2e-3), (torch.bfloat16, 2e-2)])
def test_half_precision(device, backend, dtype, tolerance):
    given_ = case(dtype=dtype)
    agree(given_, tolerance, device)
    assert {t.dtype for t in rotary(*(move(t, device) for t in given_))} == {dtype}


def test_kernels_round_once(device):
    """To the wider type of q and cos; under autocast to its type."""
    pytest.importorskip("triton")
    for kind, error in ((torch.bfloat16, 2**-7), (torch.float32, 1e-6)):
        given_ = case(dtype=torch.bfloat16, of_angles=kind)
        goal = rotary_reference(*(t.float() for t in given_))
        there = [move(t, device) for t in given_]
        with use_backend("triton"):
            found = rotary(*there)
            with torch.autocast(device, torch.bfloat16):
                cast = rotary(*there)
        for mine, less, right in zip(found, cast, goal, strict=True):
            torch.testing.assert_close(mine.cpu(), right.to(kind), rtol=error, atol=1e-6)
            torch.testing.assert_close(less.cpu(), right.bfloat16(), rtol=2**-7, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_reference_has_the_bits_of_transformers(device, dtype):
    q, k, cos, sin = (move(t, device) for t in case(dtype=dtype, layouts=("inside", "plain", "plain")))
    expected = apply_rotary_pos_emb(q.transpose(1, 2), k.transpose(1, 2), cos, sin)
    for mine, right in zip(rotary_reference(q, k, cos, sin), expected, strict=True):
        assert torch.equal(mine, right.transpose(1, 2))


def test_what_was_turned_on_one_backend_is_turned_back_on_another(device):
    pytest.importorskip("triton")
    q, k, cos, sin = (move(t, device) for t in case())
    gradients = []
    for name in BACKENDS:
        leaves = [t.detach().clone().requires_grad_() for t in (q, k)]
        with use_backend("triton"):
            one, two = rotary(*leaves, cos, sin)
        with use_backend(name):
            (one.square().sum() + two.pow(3).sum()).backward()
        gradients.append([t.grad for t in leaves])
    torch.testing.assert_close(*gradients)


def test_tensors_that_do_not_fit_are_refused(device):
    q, k, cos, sin = case()
    wrong = [
        (q, k[:1], cos, sin), (q, k[..., :6], cos, sin), (q, k[:, :3], cos, sin), (q, k.double(), cos, sin),
        (q, k, cos[:, :3], sin[:, :3]), (q, k, cos, sin[..., :4]), (q[..., :7], k[..., :7], cos[..., :7], sin[..., :7]),
        (q, k, cos[0], sin[0]), (q.flatten(2), k.flatten(2), cos, sin),
    ]  # fmt: skip
    for arguments in wrong:
        with pytest.raises(MLFSError, match="expected q and k"):
            rotary(*arguments)


@pytest.mark.parametrize("name", BACKENDS)
def test_opcheck(device, name):
    if name == "triton":
        pytest.importorskip("triton")
    q, k, cos, sin = (move(t, device) for t in case(layouts=("inside", "transposed", "plain")))
    with use_backend(name):
        for backward in (False, True):
            torch.library.opcheck(OP, (q.requires_grad_(), k.requires_grad_(), cos, sin, torch.float32, backward))
