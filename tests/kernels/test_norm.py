"""The norm operator, on its reference and on its kernels, against the formula in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mlfs import MLFSError
from mlfs.ops.backend import use_backend
from mlfs.ops.norm import layer_norm, rms_norm
from tests.calls import strided
from tests.devices import examples, move, on_each_device
from tests.helpers.norms import add_norm, add_norm_reference

EPS = 1e-5
pytestmark = on_each_device
OPS = torch.ops.mlfs.add_norm.default, torch.ops.mlfs.add_norm_backward.default


@pytest.fixture(params=["reference", "triton"])
def backend(request, poisoned_memory):
    """Either backend."""
    if request.param == "triton":
        pytest.importorskip("triton")
    with use_backend(request.param):
        yield request.param


def case(
    shape: tuple[int, ...],
    full: int,
    layout: str,
    dtype: torch.dtype,
    residual: bool,
    weight: bool,
    bias: bool,
    seed: int,
) -> dict[str, Tensor | None]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "x": strided(shape, layout, generator, dtype) * 3 + 1,
        "residual": strided(shape, layout, generator, dtype) if residual else None,
        "weight": strided((full,), "plain", generator, dtype) if weight else None,
        "bias": strided((full,), "plain", generator, dtype) if bias else None,
    }


@st.composite
def cases(draw, dtype: torch.dtype = torch.float32) -> dict[str, Tensor | None]:
    n = draw(st.integers(2, 40))
    leading = tuple(draw(st.lists(st.integers(0, 5), max_size=3)))
    layout = draw(st.sampled_from(["plain", "inside", "transposed", "expanded"]))
    flags = [draw(st.booleans()) for _ in range(3)]
    return case((*leading, n), n + draw(st.integers(0, 3)), layout, dtype, *flags, draw(st.integers(0, 2**31)))


def agree(given_: dict[str, Tensor | None], rms: bool, tolerance: float, device: str, p: float = 0.0) -> None:
    leaves = {k: None if t is None else move(t, device).requires_grad_() for k, t in given_.items()}
    exact = {k: None if t is None else t.detach().double().requires_grad_() for k, t in given_.items()}
    seed = torch.tensor([1234567890123], device=device) if p else None
    y, s = add_norm(**leaves, eps=EPS, rms=rms, p=p, seed=seed)
    scaled = dict(exact)
    if p:  # the mask that was drawn
        added = 0 if given_["residual"] is None else given_["residual"].double()
        kept = ((s.detach().cpu().double() - added).abs() > 1e-3 * given_["x"].double().abs()).double()
        scaled["x"] = exact["x"] * kept / (1 - p)
    goal, carried = add_norm_reference(**scaled, eps=EPS, rms=rms)
    generator = torch.Generator().manual_seed(1)
    dy, ds = (torch.randn(y.shape, generator=generator) for _ in range(2))
    ((y.float() * dy.to(device)).sum() + (s.float() * ds.to(device)).sum()).backward()
    ((goal * dy.double()).sum() + (carried * ds.double()).sum()).backward()
    pairs = [(y.detach(), goal.detach()), (s.detach(), carried.detach())]
    pairs += [(leaves[k].grad, exact[k].grad) for k in exact if exact[k] is not None]
    for mine, right in pairs:
        assert mine.shape == right.shape
        largest = max(right.abs().amax().item(), 1.0) if right.numel() else 1.0
        assert right.numel() == 0 or (mine.cpu().double() - right).abs().amax().item() <= tolerance * largest


@settings(max_examples=examples(40))
@given(case=cases(), rms=st.booleans())
@pytest.mark.parametrize("name", ["reference", "triton"])
def test_equals_the_formula(device, name, case, rms):
    if name == "triton":
        pytest.importorskip("triton")
    with use_backend(name):
        agree(case, rms, 1e-4, device)


@pytest.mark.parametrize("rms", [False, True])
@pytest.mark.parametrize("shape", [(70, 100), (3, 5000), (1, 1), (33, 64)])
def test_across_rows_and_widths(device, backend, shape, rms):
    if shape[-1] == 1 and not rms:
        return  # every number is its own mean: the gradient is zero by cancellation alone
    agree(case(shape, shape[-1], "plain", torch.float32, True, True, not rms, 0), rms, 1e-4, device)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float16, 1e-2), (torch.bfloat16, 6e-2)])
@pytest.mark.parametrize("rms", [False, True])
def test_half_precision(device, backend, rms, dtype, tolerance):
    agree(case((20, 48), 50, "plain", dtype, True, True, not rms, 0), rms, tolerance, device)


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("rms", [False, True])
def test_dropout_is_drawn_again_in_the_backward_pass(device, backend, rms, residual):
    agree(case((40, 60), 60, "plain", torch.float32, residual, True, not rms, 0), rms, 1e-4, device, p=0.3)


def test_dropout_drops_the_share_asked_for_and_follows_the_seed(device, backend):
    x = torch.ones(200, 300, device=device)

    def kept(seed: int, p: float = 0.25) -> Tensor:
        return add_norm(x, torch.zeros_like(x), None, None, EPS, True, p, torch.tensor([seed], device=device))[1]

    first = kept(7)
    assert set(first.unique().tolist()) == {0.0, torch.tensor(1 / 0.75).item()}
    assert abs((first == 0).float().mean().item() - 0.25) < 0.01
    assert abs((first[:, ::2] == first[:, 1::2]).float().mean().item() - (0.25**2 + 0.75**2)) < 0.02  # independent
    assert torch.equal(first, kept(7)) and not torch.equal(first, kept(8))
    torch.manual_seed(0)
    a = add_norm(x, None, None, None, EPS, True, 0.5)[1]
    torch.manual_seed(0)
    assert torch.equal(a, add_norm(x, None, None, None, EPS, True, 0.5)[1])


@pytest.mark.parametrize("p", [-0.1, 1.0, float("nan")])
def test_a_probability_outside_its_range_is_refused(device, p):
    with pytest.raises(MLFSError, match="a probability of dropout is at least 0 and below 1"):
        add_norm(torch.ones(2, 3), None, None, None, EPS, True, p)


def test_layers_take_the_kernels(device, backend):
    generator = torch.Generator().manual_seed(0)
    x, w, b = (torch.randn(size, generator=generator).to(device) for size in ((5, 30), (40,), (40,)))
    expected = torch.nn.functional.layer_norm(x, (30,), w[:30], b[:30], EPS)
    torch.testing.assert_close(layer_norm(x, w, b, EPS), expected)
    torch.testing.assert_close(rms_norm(x, w, EPS), torch.nn.functional.rms_norm(x, (30,), w[:30], EPS))
    assert rms_norm(x.bfloat16(), w, EPS).dtype == torch.float32  # as the Llama family's product with an fp32 weight


@pytest.mark.parametrize("rms", [False, True])
def test_a_residual_of_a_wider_type_keeps_it(backend, device, rms):
    """As under autocast: a half-precision product is added to a residual stream in fp32."""
    given_ = case((20, 48), 50, "plain", torch.bfloat16, True, True, not rms, 0)
    wide = given_ | {k: given_[k].float() for k in ("residual", "weight")}
    wide["bias"] = None if rms else given_["bias"].float()
    agree(wide, rms, 1e-2, device)
    there = {k: None if t is None else move(t, device) for k, t in wide.items()}
    y, s = add_norm(**there, eps=EPS, rms=rms)
    assert y.dtype == s.dtype == torch.float32
    assert torch.equal(s.cpu(), wide["x"].float() + wide["residual"])


@pytest.mark.parametrize("residual", [torch.bfloat16, torch.float32, None])
@pytest.mark.parametrize("rms", [False, True])
def test_autocast_leaves_the_type_of_the_sum(backend, device, rms, residual):
    """LayerNorms take it in fp32; their gradient comes back in its own type."""
    given_ = case((20, 48), 50, "plain", torch.bfloat16, residual is not None, True, not rms, 0)
    if residual is not None:
        given_["residual"] = given_["residual"].to(residual)
    given_ |= {k: None if given_[k] is None else given_[k].float() for k in ("weight", "bias")}
    there = {k: None if t is None else move(t, device) for k, t in given_.items()}
    there["x"].requires_grad_()
    with torch.autocast(device, torch.bfloat16):
        y, s = add_norm(**there, eps=EPS, rms=rms)
    assert s.dtype == (residual or torch.bfloat16)
    right = there["x"].detach() if residual is None else there["residual"] + there["x"].detach()
    torch.testing.assert_close(s.detach(), right, rtol=1e-2, atol=1e-2)
    (y.float().sum() + s.float().sum()).backward()
    assert there["x"].grad.dtype == torch.bfloat16 and there["x"].grad.abs().sum() > 0


@pytest.mark.parametrize("p", [0.0, 0.5])
@pytest.mark.parametrize("residual", [True, False])
def test_opcheck(device, residual, p):
    given_ = {k: None if t is None else move(t, device).requires_grad_() for k, t in
              case((4, 6), 8, "plain", torch.float64, residual, True, True, 0).items()}  # fmt: skip
    seed = torch.tensor([3], device=device) if p else None
    torch.library.opcheck(OPS[0], (*given_.values(), EPS, False, p, seed))
    dy, ds, s = (torch.randn(4, 6, device=device).double() for _ in range(3))
    for trains in (True, False):
        torch.library.opcheck(OPS[1], (dy, ds, s, given_["weight"].detach(), EPS, True, p, seed, trains))
