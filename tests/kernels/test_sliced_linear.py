"""The sliced linear operator's kernels, on a GPU or in Triton's interpreter, against the dense product in float64."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mlfs.ops.backend import use_backend
from mlfs.ops.sliced_linear import sliced_linear
from tests.calls import Call, calls, example, strided
from tests.devices import examples, move, on_each_device

pytest.importorskip("triton")
pytestmark = on_each_device
TOLERANCE = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}
DTYPES = pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda kind: str(kind)[6:])


@pytest.fixture(autouse=True)
def kernels(poisoned_memory):
    with use_backend("triton"):
        yield


def agree(call: Call, device: str) -> None:
    """The operator's result and gradients equal those of the dense product, relative to each tensor's size."""
    dtype = call.x.dtype
    stages = tuple(range(len(call.lora_a)))
    mine, exact = to(call, device).trains(stages=stages), call.trains(stages=stages)
    y, goal = mine(sliced_linear), exact.dense()
    assert y.dtype == dtype and y.shape == goal.shape
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    y.backward(dy.to(device))
    goal.backward(dy.double())
    gradients = zip(mine.leaves, exact.leaves, strict=True)
    pairs = [
        ("y", y.detach(), goal.detach()),
        *((f"gradient {i}", a.grad, b.grad) for i, (a, b) in enumerate(gradients)),
    ]
    # What cancels is only as good as what it is the difference of: errors are relative to the largest number.
    for what, a, b in pairs:
        assert a.dtype in (dtype, torch.float32)
        scale = max(float(b.abs().amax()) if b.numel() else 0.0, 1.0)
        error = float((a.cpu().double() - b.double()).abs().amax()) if b.numel() else 0.0
        assert error <= TOLERANCE[dtype] * scale, f"{what}: {error} of {scale}"


def infer(call: Call, device: str) -> None:
    """Without gradients: nothing is kept, and a few tokens take the kernel for decoding."""
    with torch.no_grad():
        y = to(call, device)(sliced_linear).cpu()
    goal, dtype = call.dense(), call.x.dtype
    assert y.dtype == dtype and y.shape == goal.shape
    scale = max(goal.abs().amax().item(), 1.0) if goal.numel() else 1.0
    assert goal.numel() == 0 or (y.double() - goal).abs().amax().item() <= TOLERANCE[dtype] * scale


def to(call: Call, device: str) -> Call:
    def moved(value):
        if isinstance(value, list):
            return [moved(v) for v in value]
        return move(value, device) if isinstance(value, torch.Tensor) else value

    return replace(call, **{name: moved(getattr(call, name)) for name in call.__dataclass_fields__})


@settings(max_examples=examples(30), deadline=None)
@given(calls(torch.float32, tokens=3, size=20, rank=5))
def test_inference_equals_the_dense_product_at_small_and_odd_sizes(device, call):
    infer(call, device)


@DTYPES
@pytest.mark.parametrize("activation", ["none", "gelu", "silu_mul"])
@pytest.mark.parametrize("tokens", [1, 7, 16, 17])
def test_inference_of_a_few_tokens_over_many_parts_of_the_depth(device, dtype, activation, tokens):
    generator = torch.Generator().manual_seed(3)
    x, weight = strided((tokens, 700), "plain", generator, dtype), strided((150, 720), "plain", generator, dtype) / 26
    a = [strided((8, 720), "plain", generator, torch.float32) / 26 for _ in range(2)]
    b = [strided((150, 8), "plain", generator, torch.float32) / 2 for _ in range(2)]
    spans = [0, 66, 90, 31]
    operand = strided((tokens, 97), "plain", generator, dtype) if activation == "silu_mul" else None
    residual = strided((tokens, 97), "plain", generator, dtype)
    bias = strided((150,), "plain", generator, dtype)
    infer(Call(x, weight, bias, a, b, [2.0, 0.5], spans, activation, operand, residual), device)


@settings(max_examples=examples(60), deadline=None)
@given(calls(torch.float32, tokens=5, size=20, rank=5))
def test_equals_the_dense_product_at_small_and_odd_sizes(device, call):
    agree(call, device)


@settings(max_examples=examples(12), deadline=None)
@given(calls(torch.float32, tokens=6, size=150, rank=9))
def test_equals_the_dense_product_across_tile_edges(device, call):
    agree(call, device)


@DTYPES
@settings(max_examples=examples(6), deadline=None)
@given(st.data())
def test_every_type(device, dtype, data):
    agree(data.draw(calls(dtype, tokens=5, size=90, rank=9)), device)


@DTYPES
@pytest.mark.parametrize("activation", ["none", "gelu", "gelu_tanh", "silu_mul"])
@pytest.mark.parametrize("layout", ["plain", "transposed", "every second"])
def test_every_epilogue_and_layout_of_the_weight(device, dtype, activation, layout):
    generator = torch.Generator().manual_seed(3)
    x, weight = strided((67, 70), "plain", generator, dtype), strided((130, 80), layout, generator, dtype) / 8
    a = [strided((8, 80), "plain", generator, torch.float32) / 8 for _ in range(2)]
    b = [strided((130, 8), "plain", generator, torch.float32) / 8 for _ in range(2)]
    shape = (67, 66 + 31)
    call = Call(
        x, weight, strided((130,), "plain", generator, dtype), a, b, [2.0, 0.5], [0, 66, 90, 31], activation,
        strided(shape, "plain", generator, dtype) if activation == "silu_mul" else None,
        strided(shape, "plain", generator, dtype),
    )  # fmt: skip
    agree(call, device)


@pytest.mark.parametrize("spans", [(0, 1, 2, 1, 4, 1, 6, 1), (0, 3, 3, 0, 5, 5), (9, 1)])
@pytest.mark.parametrize("ranks", [(3, 3, 3, 3), (1, 4), (70,)])
def test_more_spans_and_stages_than_one_launch_takes(device, spans, ranks):
    call = example(torch.float32, spans=spans, stages=0)
    generator = torch.Generator().manual_seed(5)
    a = [strided((r, 8), "plain", generator, torch.float32) for r in ranks]
    b = [strided((10, r), "plain", generator, torch.float32) for r in ranks]
    agree(replace(call, lora_a=a, lora_b=b, scales=[2.0, 0.5, -1.0, 3.0][: len(ranks)]), device)


@pytest.mark.parametrize("tokens", [(0,), (3, 0), (1,), ()])
def test_no_tokens_and_one(device, tokens):
    agree(example(torch.float32, tokens=tokens, spans=(0, 2, 3, 3), activation="gelu"), device)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rank", [1, 8, 20])
def test_gradients_over_many_tiles_of_tokens_and_spans(device, dtype, rank):
    """Of one pass over dy for 16-bit numbers, and of the passes that a rank too large for it takes."""
    generator = torch.Generator().manual_seed(7)
    x, weight = strided((300, 40), "plain", generator, dtype), strided((200, 40), "plain", generator, dtype) / 6
    a = [strided((rank, 40), "plain", generator, torch.float32) / 6 for _ in range(2)]
    b = [strided((200, rank), "plain", generator, torch.float32) / 8 for _ in range(2)]
    agree(Call(x, weight, None, a, b, [2.0, 0.5], [1, 70, 75, 33, 120, 65]), device)


@DTYPES
def test_only_what_is_asked_for_is_computed(device, dtype):
    call = example(dtype, stages=3)
    mine, exact = to(call, device).trains(x=False, stages=(1,)), call.trains(x=False, stages=(1,))
    mine(sliced_linear).sum().backward()
    exact.dense().sum().backward()
    assert mine.x.grad is None and mine.lora_a[0].grad is None and mine.lora_b[2].grad is None
    near = {"rtol": TOLERANCE[dtype], "atol": TOLERANCE[dtype]}
    torch.testing.assert_close(mine.lora_a[1].grad.cpu(), exact.lora_a[1].grad, **near)
    torch.testing.assert_close(mine.lora_b[1].grad.cpu(), exact.lora_b[1].grad, **near)


@DTYPES
def test_two_runs_agree_bit_for_bit(device, dtype):
    generator = torch.Generator().manual_seed(0)

    def run() -> list[torch.Tensor]:
        call = Call(x, weight, None, [torch.ones(8, 70)], [torch.ones(70, 8)], [1.0], [0, 70])
        call = to(call, device).trains(stages=(0,))
        y = call(sliced_linear)
        return [y.detach(), *call.gradients(lambda *_: y, torch.ones_like(y))]

    x, weight = strided((700, 70), "plain", generator, dtype), strided((70, 70), "plain", generator, dtype)
    for first, second in zip(run(), run(), strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("tokens", [5, 40])
@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_a_residual_of_a_wider_type_keeps_it(backend, device, tokens):
    """As under autocast: a half-precision product is added to a residual stream in fp32."""
    generator = torch.Generator().manual_seed(0)
    x, weight = (strided(shape, "plain", generator, torch.bfloat16) for shape in ((tokens, 20), (30, 20)))
    residual = strided((tokens, 30), "plain", generator, torch.float32) + 1000
    a, b = (strided(shape, "plain", generator, torch.float32) for shape in ((4, 20), (30, 4)))
    call = Call(x, weight, None, [a], [b], [1.0], [0, 30], residual=residual)
    with use_backend(backend):
        with torch.no_grad():
            y = to(call, device)(sliced_linear)
        mine, exact = to(call, device).trains(stages=(0,)), call.trains(stages=(0,))
        trained = mine(sliced_linear)
        trained.backward(torch.ones_like(trained))
    goal = exact.dense()
    goal.backward(torch.ones_like(goal))
    for got in (y, trained):
        assert got.dtype == torch.float32
        assert (got.cpu() - goal).abs().max() < 0.9  # in bf16 numbers around 1000 are 4 apart
    for ours, theirs in zip(mine.leaves, exact.leaves, strict=True):
        assert ours.grad.dtype == ours.dtype
        assert (ours.grad.cpu().double() - theirs.grad).abs().max() < 0.05 * theirs.grad.abs().max()
