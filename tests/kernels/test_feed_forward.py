"""The feed-forward block in one call, on the reference and on the kernels, against the formula in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mlfs import MLFSError
from mlfs.ops.backend import use_backend
from mlfs.ops.feed_forward import feed_forward, feed_forward_reference
from mlfs.ops.layer import ACTIVATIONS, LowRankLinear
from tests import projections
from tests.calls import LAYOUTS, strided
from tests.devices import examples, on_each_device

pytestmark = [on_each_device, pytest.mark.usefixtures("poisoned_memory")]
BACKENDS = ["reference", "triton", "cpp"]
ADDS = ("nothing", "residual", "x", "x, carried", "nothing, carried", "residual, carried")
Case = tuple[Tensor, list[LowRankLinear], str, Tensor | None]


def of_backend(name: str, device: str):
    """The block in which `name` computes; skipped where it cannot."""
    if name == "triton":
        pytest.importorskip("triton")
    if name == "cpp":
        if device != "cpu":
            pytest.skip("the extension is for CPUs")
        pytest.importorskip("mlfs._cpu")
    return use_backend(name)


def case(
    leading: tuple[int, ...] = (2, 3), n: int = 20, ffn: int = 9, activation: str = "silu_mul", adds: str = "residual",
    seed: int = 0, layout: str = "plain", **options,
) -> Case:  # fmt: skip
    """x, the layers, the activation and a residual, which is x itself where that is added."""
    x, ups = projections.case(
        leading, n, (ffn, ffn) if activation == "silu_mul" else (ffn,), seed=seed, of_x=layout, **options
    )
    _, (down,) = projections.case((1,), ffn, (n,), seed=seed + 1, **options)
    residual = strided((*leading, n), layout, torch.Generator().manual_seed(seed + 2), x.dtype)
    return x, [*ups, down], activation, x if adds[0] == "x" else residual if adds.startswith("residual") else None


def agree(made: Case, returns_input: bool, device: str, tolerance: float, stage: int | None = 0) -> None:
    outcomes = []
    for place, dtype in ((device, None), ("cpu", torch.float64)):
        x, layers, wanted = projections.leaves(*made[:2], place, dtype, stage)
        residual = x if made[3] is made[0] else None
        if made[3] is not None and residual is None:
            residual = made[3].detach().to(place, dtype).requires_grad_()
            wanted.append(residual)
        if dtype is None:
            y, *more = feed_forward(x, layers, made[2], residual, returns_input)
        else:
            y, more = feed_forward_reference(x, layers, made[2], residual), [x] if returns_input else []
        generator = torch.Generator().manual_seed(1)
        dys = [strided(t.shape, "transposed", generator, torch.float64) for t in (y, *more)]
        sum((t * dy.to(place, t.dtype)).sum() for t, dy in zip((y, *more), dys, strict=True)).backward()
        outcomes.append([y.detach(), *(t.grad for t in wanted)])
    for found, goal in zip(*outcomes, strict=True):
        assert found.shape == goal.shape
        largest = max(goal.abs().amax().item(), 1.0) if goal.numel() else 1.0
        assert goal.numel() == 0 or (found.cpu().double() - goal).abs().amax().item() <= tolerance * largest


@st.composite
def cases(draw) -> tuple[Case, bool, int | None]:
    stages, leading = draw(st.integers(0, 4)), tuple(draw(st.lists(st.integers(0, 9), max_size=2)))
    n, ffn = (draw(st.integers(1, 80)) for _ in range(2))
    adds = draw(st.sampled_from(ADDS))
    activation, layout = draw(st.sampled_from(ACTIVATIONS[1:])), draw(st.sampled_from(LAYOUTS))
    seed = draw(st.integers(0, 2**31))
    options = {"stages": stages, "rank": draw(st.integers(1, 9)), "bias": draw(st.booleans())}
    made = case(leading, n, ffn, activation, adds, seed, layout, **options)
    return made, adds.endswith("carried"), draw(st.sampled_from([None, *range(stages)]))


@settings(max_examples=examples(30))
@given(drawn=cases())
@pytest.mark.parametrize("name", BACKENDS)
def test_equals_the_formula(device, name, drawn):
    made, returns_input, stage = drawn
    with of_backend(name, device):
        agree(made, returns_input, device, 1e-5, stage)


@pytest.mark.parametrize("activation", ACTIVATIONS[1:])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float16, 2e-2), (torch.bfloat16, 1e-1)])
def test_half_precision_across_tiles(device, dtype, tolerance, activation):
    with of_backend("triton", device):
        agree(case((70,), 150, 130, activation, "x", dtype=dtype), True, device, tolerance)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("activation", ["gelu", "silu_mul"])
def test_adapters_train_where_x_needs_no_gradient(device, name, activation):
    """And where only those of `down` train."""
    made = case(activation=activation)
    for only in (None, len(made[1]) - 1):
        with of_backend(name, device):
            outcomes = []
            for place, dtype, op in ((device, None, feed_forward), ("cpu", torch.float64, feed_forward_reference)):
                x, layers, (_, *wanted) = projections.leaves(*made[:2], place, dtype, 0)
                for t in wanted[: 0 if only is None else 2 * only]:
                    t.requires_grad_(False)
                (y,) = op(x.detach(), layers, activation) if dtype is None else [op(x.detach(), layers, activation)]
                y.sum().backward()
                outcomes.append([t.grad for t in wanted])
        for found, goal in zip(*outcomes, strict=True):
            assert (found is None) == (goal is None)
            if goal is not None:
                torch.testing.assert_close(found.cpu().double(), goal, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", BACKENDS)
def test_what_comes_back_through_x_alone_goes_on(device, name):
    x, layers, activation, _ = case()
    x, layers, wanted = projections.leaves(x, layers, device, None, 0)
    with of_backend(name, device):
        _, carried = feed_forward(x, layers, activation, returns_input=True)
        carried.sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))
    assert all(t.grad is None for t in wanted[1:])


def test_a_residual_of_a_wider_type_keeps_it(device):
    """As under autocast; there x itself is not what the layers read."""
    x, layers, activation, residual = case()
    x, layers, _ = projections.leaves(x, layers, device, None, 0)
    exact = projections.leaves(x, layers, "cpu", torch.float64, 0)
    for added, goal in ((residual.to(device), residual.double()), (x, exact[0])):
        with of_backend("triton", device), torch.autocast(device, torch.bfloat16):
            y, carried = feed_forward(x, layers, activation, added, returns_input=True)
            (y + carried).sum().backward()
        assert y.dtype == carried.dtype == x.grad.dtype == torch.float32
        expected = feed_forward_reference(exact[0], exact[1], activation, goal)
        assert (y.detach().cpu().double() - expected).abs().amax() <= 0.05 * expected.abs().amax()


def test_layers_that_cannot_go_together_are_refused(device):
    x, layers, _, _ = case()
    more = case(stages=2)[1]
    wrong = [
        (layers[:2], "silu_mul"), (layers, "gelu"), (layers[1:], "relu"), ([*layers[:2], more[2]], "silu_mul"),
        ([*layers[:2], layers[2]._replace(bias=None)], "silu_mul"),
        ([layers[0], layers[1]._replace(spans=[0, 5]), layers[2]], "silu_mul"),
    ]  # fmt: skip
    for some, activation in wrong:
        with pytest.raises(MLFSError, match="expected up and down, or gate, up and down"):
            feed_forward(x, some, activation)


@pytest.mark.parametrize("name", ["reference", "triton"])
@pytest.mark.parametrize(
    "activation, stages, bias", [("silu_mul", 1, True), ("gelu", 2, False), ("gelu_tanh", 0, True)]
)
def test_opcheck(device, name, activation, stages, bias):
    x, layers, _, residual = case(activation=activation, stages=stages, bias=bias)
    x, layers, _ = projections.leaves(x, layers, device, None, 0)
    residual = residual.to(device).requires_grad_()
    a, b = [t for p in layers for t in p.lora_a], [t for p in layers for t in p.lora_b]
    biases, scales = [p.bias for p in layers if p.bias is not None], [c for p in layers for c in p.scales]
    spans, weights = [n for p in layers for n in p.spans], [p.weight for p in layers]
    with of_backend(name, device):
        for added, adds_x in ((residual, False), (None, False), (None, True)):
            arguments = (x, added, weights, biases, a, b, scales, spans, activation, adds_x)
            torch.library.opcheck(torch.ops.mlfs.feed_forward.default, arguments)
        z, up, act = (torch.ones(6, 9, device=device) for _ in range(3))
        up = up if activation == "silu_mul" else None
        h, h_down = (torch.ones(6, count * stages * 4, device=device) for count in (len(layers) - 1, 1))
        lists = weights, [t.detach() for t in a], [t.detach() for t in b]
        dy = torch.ones(2, 3, 20, device=device)
        for needs_dx in (False, True):
            trains = [s % max(stages, 1) == 0 for s in range(len(a))]
            kept = x.detach(), h, h_down, act, z, up, dy if needs_dx else None
            arguments = (dy, *kept, *lists, scales, spans, trains, needs_dx, 20, activation)
            torch.library.opcheck(torch.ops.mlfs.feed_forward_backward.default, arguments)
