"""Linear layers over one x in one call, on the reference and on the kernels, against the formula in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mlfs import MLFSError
from mlfs.ops.backend import use_backend
from mlfs.ops.joint_linear import joint_linear, joint_linear_reference
from mlfs.ops.layer import LowRankLinear
from tests.calls import LAYOUTS, strided
from tests.devices import examples, on_each_device
from tests.projections import case, leaves

pytestmark = [on_each_device, pytest.mark.usefixtures("poisoned_memory")]
BACKENDS = ["reference", "triton"]


def agree(
    x: Tensor, layers: list[LowRankLinear], gated: bool, device: str, tolerance: float, stage: int | None = 0
) -> None:
    given_x, mine, wanted = leaves(x, layers, device, None, stage)
    exact_x, right, goals = leaves(x, layers, "cpu", torch.float64, stage)
    ys, expected = joint_linear(given_x, mine, gated), joint_linear_reference(exact_x, right, gated)
    generator = torch.Generator().manual_seed(1)
    dys = [strided(y.shape, "transposed", generator, torch.float64) for y in expected]
    torch.autograd.backward(ys, [d.to(y.dtype).to(device) for d, y in zip(dys, ys, strict=True)])
    torch.autograd.backward(expected, dys)
    with torch.no_grad():
        again = joint_linear(given_x, mine, gated)
    pairs = list(
        zip([*ys, *again, *(t.grad for t in wanted)], [*expected, *expected, *(t.grad for t in goals)], strict=True)
    )
    assert len(pairs) == 2 * len(ys) + len(wanted)
    for found, goal in pairs:
        assert found.shape == goal.shape
        largest = max(goal.abs().amax().item(), 1.0) if goal.numel() else 1.0
        error = (found.detach().cpu().double() - goal).abs().amax().item() if goal.numel() else 0.0
        assert error <= tolerance * largest


@st.composite
def cases(draw) -> tuple[tuple[Tensor, list[LowRankLinear]], bool, int | None]:
    gated, stages = draw(st.booleans()), draw(st.integers(0, 4))
    m = draw(st.integers(1, 80))
    rows = (m, m) if gated else tuple(draw(st.lists(st.integers(1, 80), min_size=2, max_size=3)))
    leading = tuple(draw(st.lists(st.integers(0, 9), max_size=2)))
    made = case(leading, draw(st.integers(1, 80)), rows, stages, draw(st.integers(1, 9)), draw(st.booleans()),
                draw(st.sampled_from(LAYOUTS)), draw(st.sampled_from((*LAYOUTS, "expanded"))),
                seed=draw(st.integers(0, 2**31)))  # fmt: skip
    return made, gated, draw(st.sampled_from([None, *range(stages)]))


@settings(max_examples=examples(40))
@given(drawn=cases())
@pytest.mark.parametrize("name", BACKENDS)
def test_equals_the_formula(device, name, drawn):
    if name == "triton":
        pytest.importorskip("triton")
    (x, layers), gated, stage = drawn
    with use_backend(name):
        agree(x, layers, gated, device, 2e-5, stage)  # of fp32: 1.2e-5 was seen, in one of some thousand examples


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float16, 2e-2), (torch.bfloat16, 1e-1)])
def test_half_precision_across_tiles(device, dtype, tolerance, gated):
    pytest.importorskip("triton")
    x, layers = case((70,), 150, (130, 130) if gated else (130, 70, 3), dtype=dtype)
    with use_backend("triton"):
        agree(x, layers, gated, device, tolerance)


@pytest.mark.parametrize("selects", [True, False])
@pytest.mark.parametrize("stages", range(5))
@pytest.mark.parametrize("rows", [(70, 70), (65, 3, 130), (7, 70)])
def test_any_number_of_stages_across_tiles(device, monkeypatch, rows, stages, selects):
    """In one loop and in several; of weights that lie alike, and each in its own way, with biases and without."""
    pytest.importorskip("triton")
    from mlfs.kernels import joint

    if not selects:
        monkeypatch.setattr(joint, "_selects", lambda device: False)
    x, layers = case((67,), 75, rows, stages)
    _, transposed = case((67,), 75, rows, stages, layout="transposed")
    mixed = [case((67,), 75, rows, stages, bias=False, layout=how)[1][i] for i, how in enumerate(LAYOUTS[: len(rows)])]
    gated = rows == (70, 70)
    with use_backend("triton"):
        for some in (layers, transposed, mixed):
            agree(x, some, gated, device, 1e-5, stages - 1 if stages else None)


@pytest.mark.parametrize("gated", [False, True])
def test_what_is_not_kept_is_not_written(device, gated):
    pytest.importorskip("triton")
    from mlfs.kernels import joint

    x, layers = case((37,), rows=(70, 70))
    exact = leaves(x, layers, "cpu", torch.float64, None)
    goals = [y.detach() for y in joint_linear_reference(*exact[:2], gated)]
    z, up = (y.detach() for y in joint_linear_reference(*exact[:2]))
    x, layers, _ = leaves(x, layers, device, None, None)
    low_rank = [LowRankLinear(*layer[:5], [0, layer.rows]) for layer in layers]
    for keep in (False, True):
        ys, _, pre = joint.forward(x.detach(), low_rank, gated, keep)
        right = [goals[0], up, z] if gated and keep else goals
        found = [*ys, pre] if gated and keep else ys[: len(goals)]
        for mine, one in zip(found, right, strict=True):
            torch.testing.assert_close(mine.cpu().double(), one, rtol=1e-4, atol=1e-4)
        assert [t.numel() for t in (ys[1], pre)] == [0 if gated and not keep else 2590, 2590 if gated and keep else 0]


@pytest.mark.parametrize("name", BACKENDS)
def test_outputs_that_nothing_comes_back_through_count_as_zero(device, name):
    if name == "triton":
        pytest.importorskip("triton")
    x, layers = case()
    with use_backend(name):
        given_x, mine, wanted = leaves(x, layers, device, None, 0)
        joint_linear(given_x, mine)[1].sum().backward()
    exact_x, right, goals = leaves(x, layers, "cpu", torch.float64, 0)
    joint_linear_reference(exact_x, right)[1].sum().backward()
    assert exact_x.grad is not None and goals[1].grad is None
    for found, goal in zip(wanted, goals, strict=True):
        right_one = torch.zeros_like(goal) if goal.grad is None else goal.grad
        torch.testing.assert_close(found.grad.cpu().double(), right_one, rtol=1e-4, atol=1e-4)


def test_layers_that_cannot_go_together_are_refused(device):
    x, layers = case()
    one_more, other_rank, other_type = case(stages=2)[1], case(rank=3)[1], case(dtype=torch.float16)[1]
    wrong = [
        (layers[:1], False), (layers * 2, False), ([layers[0], one_more[1]], False),
        ([layers[0], other_rank[1]], False), ([layers[0], layers[1]._replace(bias=None)], False), (layers, True),
        (layers[:2], True), ([layers[0], other_type[1]], False),
    ]  # fmt: skip
    for some, gated in wrong:
        with pytest.raises(MLFSError, match="expected two or three"):
            joint_linear(x, some, gated)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("gated, stages, bias", [(False, 1, True), (True, 2, False), (False, 0, False)])
def test_opcheck(device, name, gated, stages, bias):
    if name == "triton":
        pytest.importorskip("triton")
    x, layers = case(rows=(6, 6) if gated else (9, 5, 7), stages=stages, bias=bias)
    x, layers, _ = leaves(x, layers, device, None, 0)
    a, b = [t for p in layers for t in p.lora_a], [t for p in layers for t in p.lora_b]
    biases, scales = [p.bias for p in layers if p.bias is not None], [c for p in layers for c in p.scales]
    rows, weights, spans = [p.rows for p in layers], [p.weight for p in layers], [n for p in layers for n in p.spans]
    with use_backend(name):
        for keep in (False, True):
            tensors = (x, weights, biases, a, b) if keep else (x.detach(), weights, biases, *_detached(a, b))
            torch.library.opcheck(torch.ops.mlfs.joint_linear.default, (*tensors, scales, spans, gated, keep))
        h = torch.ones(6, len(a) * 4, device=device)
        z, up = (torch.ones(6, 6, device=device) for _ in range(2)) if gated else (None, None)
        dys = [torch.ones(2, 3, m, device=device) for m in (rows[:1] if gated else rows)]
        for needs_dx in (False, True):
            trains = [s % max(stages, 1) == 0 for s in range(len(a))]
            residual = torch.ones(2, 3, 20, device=device) if needs_dx else None
            of_layers = weights, *_detached(a, b), scales, spans
            arguments = (dys, x.detach(), h, z, up, residual, *of_layers, trains, needs_dx, 20)
            torch.library.opcheck(torch.ops.mlfs.joint_linear_backward.default, arguments)


def _detached(*lists: list[Tensor]) -> list[list[Tensor]]:
    return [[t.detach() for t in some] for some in lists]


@pytest.mark.parametrize("name", ["reference", "triton", "cpp"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_x_carried_on_gets_all_gradients(device, name, dtype):
    """Those through the layers and those through x, whichever there are."""
    if name == "triton":
        pytest.importorskip("triton")
    if name == "cpp" and (device != "cpu" or dtype != torch.float32):
        pytest.skip("the extension is for fp32 on CPUs")
    x, layers = case((70,), 150, (130, 70, 3), dtype=dtype)
    for reads in ((True, True), (True, False), (False, True)):
        outcomes = []
        for place, kind in ((device, None), ("cpu", torch.float64)):
            given_x, some, wanted = leaves(x, layers, place, kind, 0)
            with use_backend(name if kind is None else "reference"):
                if kind is None:
                    *ys, carried = joint_linear(given_x, some, returns_input=True)
                    assert carried is not given_x
                    assert carried.data_ptr() == given_x.data_ptr()
                else:
                    ys, carried = joint_linear_reference(given_x, some), given_x
                generator = torch.Generator().manual_seed(1)
                dys = [torch.randn(y.shape, generator=generator).to(place, y.dtype) for y in (*ys, carried)]
                read = [*(ys if reads[0] else []), *([carried] if reads[1] else [])]
                torch.autograd.backward(read, dys if reads[0] and reads[1] else dys[:3] if reads[0] else dys[3:])
            outcomes.append([t.grad for t in wanted])
        for found, goal in zip(*outcomes, strict=True):
            assert (found is None) == (goal is None)
            if goal is not None:
                tolerance = 1e-5 if dtype == torch.float32 else 3e-2
                assert (found.cpu().double() - goal).abs().amax() <= tolerance * goal.abs().amax()
