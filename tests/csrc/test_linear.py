"""The compiled linear layers for CPUs against the dense product in float64."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mlfs.ops.joint_linear import joint_linear, joint_linear_reference
from mlfs.ops.layer import LowRankLinear
from mlfs.ops.sliced_linear import sliced_linear
from tests.calls import EXAMPLES, Call, calls
from tests.csrc.helpers import TYPES, close, cpu


def agree(call: Call) -> None:
    dtype, stages = call.x.dtype, tuple(range(len(call.lora_a)))
    with torch.no_grad():
        close(call(sliced_linear), call.dense(), dtype)
    mine, exact = call.trains(stages=stages), call.trains(stages=stages)
    y, goal = mine(sliced_linear), exact.dense()
    close(y.detach(), goal.detach(), dtype)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    y.backward(dy.to(dtype))
    goal.backward(dy.to(dtype).double())
    for ours, theirs in zip(mine.leaves, exact.leaves, strict=True):
        close(ours.grad, theirs.grad.double(), dtype, scale=4)


@TYPES
@settings(max_examples=60)
@given(st.data())
def test_the_sliced_product_equals_the_dense_one(dtype, data):
    agree(data.draw(calls(dtype)))


@TYPES
@settings(max_examples=20)
@given(st.data())
def test_the_sliced_product_across_vectors_and_tails(dtype, data):
    agree(data.draw(calls(dtype, tokens=4, size=170, rank=20)))


@TYPES
@pytest.mark.parametrize(
    ("tokens", "n", "m", "stages"),
    [
        (1100, 1100, 70, 1),
        (40, 600, 1100, 1),
        (530, 40, 2100, 1),
        (40, 30, 50, 35),
        (33, 5000, 1, 0),
        (1, 4099, 33, 2),
        (3, 33, 4099, 2),
    ],
)
def test_the_sliced_product_at_the_limits_of_its_blocks(dtype, tokens, n, m, stages):
    """Sums too deep to pack at once, more rows than wait for them, more columns or pieces than are read together."""
    generator = torch.Generator().manual_seed(0)

    def some(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=dtype) / shape[-1] ** 0.5

    lora = [some(2, n + 3) for _ in range(stages)], [some(m + 5, 2) for _ in range(stages)], [0.5] * stages
    agree(Call(some(tokens, n), some(m + 5, n + 3), some(m + 5), *lora, [0, m]))


@TYPES
@pytest.mark.parametrize("rows", [1, 8, 13, 40, 500])
@pytest.mark.parametrize("turned", [False, True], ids=["rows of b", "columns of b"])
def test_products_read_factors_as_they_lie(dtype, rows, turned):
    """Slices of both factors, transposed or not, of widths that are whole vectors and are not."""
    generator = torch.Generator().manual_seed(rows)
    for columns, depth in [(16, 64), (64, 700), (65, 64), (300, 1)]:
        a = torch.randn(depth + 3, rows + 2, generator=generator, dtype=dtype)[:depth, :rows].t()
        b = torch.randn(depth + 3, columns + 5, generator=generator, dtype=dtype)[:depth, :columns].t()
        if not turned:
            a, b = a.contiguous(), b.contiguous()
        out = torch.full((rows, columns + 4), torch.nan, dtype=dtype)
        cpu.product(a, b, None, out[:, :columns])
        close(out[:, :columns], a.double() @ b.double().t(), dtype)
        assert out[:, columns:].isnan().all()


@TYPES
@pytest.mark.parametrize(("rows", "n", "m"), [(300, 100, 90), (700, 600, 330), (1100, 40, 17), (34, 9, 6), (34, 9, 60)])
def test_without_gradients_many_tokens_read_a_weight_with_its_updates(dtype, rows, n, m):
    """As the same layer computes with its stages apart, whether or not updates are added to the weight meanwhile."""
    generator = torch.Generator().manual_seed(m)

    def some(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=dtype) / shape[-1] ** 0.5

    ranks, scales, spans = (3, 0, 9), [0.5, 1.0, -2.0], [2, m // 2, m // 2 + 4, m - m // 2]
    lora_a, lora_b = [some(r, n + 1) for r in ranks], [some(m + 7, r) for r in ranks]
    layer = some(m + 7, n + 3), some(m + 7), lora_a, lora_b, scales, spans
    x, residual = some(rows, n), some(rows, m)
    (y,) = cpu.linear(x, [layer], 1, None, residual)
    merged = layer[0][:, :n].double().clone()
    for a, b, scale in zip(lora_a, lora_b, scales, strict=True):
        merged += scale * b.double() @ a[:, :n].double()
    kept = torch.cat(
        [torch.arange(start, start + length) for start, length in zip(spans[::2], spans[1::2], strict=True)]
    )
    exact = torch.nn.functional.gelu(x.double() @ merged[kept].t() + layer[1][kept].double()) + residual.double()
    close(y, exact, dtype)
    apart, _, _ = cpu.linear_forward(x, [layer], 1, None, residual, False)[0]
    close(apart, exact, dtype)


@TYPES
@pytest.mark.parametrize("rows", [1, 20, 40, 700])
@pytest.mark.parametrize(("n", "m"), [(30, 7), (30, 40), (1100, 40), (600, 300)])
def test_stages_of_zeros_leave_every_bit_as_it_is(dtype, rows, n, m):
    """What is restored may count a stage that has no effect where the model it was saved from does not."""
    generator = torch.Generator().manual_seed(m)
    x, weight = (torch.randn(size, n, generator=generator, dtype=dtype) for size in (rows, m))
    stage = [torch.randn(3, n, generator=generator, dtype=dtype)], [torch.zeros(m, 3, dtype=dtype)], [2.0]
    for call in (
        lambda layer: cpu.linear(x, [layer], 0, None, None)[0],
        lambda layer: cpu.linear_forward(x, [layer], 0, None, None, False)[0][0],
    ):
        assert torch.equal(call((weight, None, *stage, [0, m])), call((weight, None, [], [], [], [0, m])))


@TYPES
@pytest.mark.parametrize("m", [40, 512, 513])
def test_empty_spans_change_nothing(dtype, m):
    """Also where the depth before them fills what is read together."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(m, 60, generator=generator, dtype=dtype)
    dy = torch.randn(50, m, generator=generator, dtype=dtype)
    found = [
        cpu.linear_backward([dy], None, [dy[:, :0]], [(weight, None, [], [], [], spans)], [[]], True, 60)[0]
        for spans in ([0, m], [0, m, m, 0], [0, 0, 0, m, m, 0, m, 0])
    ]
    close(found[0], dy.double() @ weight.double(), dtype, scale=4)
    assert all(torch.equal(found[0], other) for other in found[1:])


@TYPES
def test_layers_of_one_input_together_are_what_they_are_apart(dtype):
    generator = torch.Generator().manual_seed(0)

    def some(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=dtype)

    def layer(m: int, stages: int, spans: list[int]) -> tuple:
        lora = [some(3, 40) for _ in range(stages)], [some(m, 3) for _ in range(stages)], [0.5] * stages
        return some(m, 40), some(m), *lora, spans

    layers = [layer(50, 2, [0, 33]), layer(20, 0, [0, 20]), layer(90, 1, [0, 5, 30, 40])]
    x = some(70, 37)
    found = cpu.linear_forward(x, layers, 0, None, None, False)
    apart = [cpu.linear_forward(x, [one], 0, None, None, False)[0] for one in layers]
    for mine, right in zip(found, apart, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(mine, right, strict=True))
    trains = [[False, True], [], [True]]
    slopes, hs = [some(*y.shape) for y, _, _ in found], [h for _, h, _ in found]
    dx, gradients = cpu.linear_backward(slopes, x, hs, layers, trains, True, 37)
    total = torch.zeros_like(dx)
    for slope, h, one, train, mine in zip(slopes, hs, layers, trains, gradients, strict=True):
        part, (right,) = cpu.linear_backward([slope], x, [h], [one], [train], True, 37)
        total += part
        assert len(mine) == len(right) == 2 * sum(train)
        assert all(torch.equal(a, b) for a, b in zip(mine, right, strict=True))
    close(dx, total.double(), dtype)


@TYPES
@settings(max_examples=30)
@given(data=st.data())
def test_projections_of_one_input_equal_the_formula(dtype, data):
    gated, stages, n = data.draw(st.booleans()), data.draw(st.integers(0, 3)), data.draw(st.integers(1, 60))
    rows = (
        [data.draw(st.integers(1, 50))] * 2
        if gated
        else data.draw(st.lists(st.integers(1, 50), min_size=2, max_size=3))
    )
    tokens, trained = data.draw(st.integers(0, 40)), data.draw(st.integers(0, 2))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))

    def some(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=dtype)

    x, layers = some(tokens, n), []
    for m in rows:
        lora = [some(3, n + 1) for _ in range(stages)], [some(m + 2, 3) for _ in range(stages)], [0.5] * stages
        layers.append(LowRankLinear(some(m + 2, n + 1), some(m + 2), *lora, [0, m]))
    outcomes = []
    for kind, op in ((dtype, joint_linear), (torch.float64, joint_linear_reference)):
        mine = x.detach().to(kind).requires_grad_()
        kept, leaves = [], [mine]
        for w, b, lora_a, lora_b, scales, spans in layers:
            pairs = [
                [t.detach().to(kind).requires_grad_(s == trained) for s, t in enumerate(ts)] for ts in (lora_a, lora_b)
            ]
            kept.append(LowRankLinear(w.to(kind), b.to(kind), *pairs, scales, spans))
            leaves += [t for ts in pairs for t in ts if t.requires_grad]
        ys = op(mine, kept, gated)
        sum((y * (i + 1)).square().sum() for i, y in enumerate(ys)).backward()
        outcomes.append([*(y.detach() for y in ys), *(leaf.grad for leaf in leaves)])
    for a, b in zip(*outcomes, strict=True):
        close(a, b.double(), dtype, scale=50)


@pytest.mark.parametrize("call", EXAMPLES.values(), ids=EXAMPLES.keys())
def test_gradcheck_of_the_sliced_product(call):
    call = call.trains(stages=tuple(range(len(call.lora_a))))

    def run(*leaves: Tensor) -> Tensor:
        given_ = iter(leaves)
        tensors = {"x": next(given_)}
        tensors |= {name: [next(given_) for _ in call.lora_a] for name in ("lora_a", "lora_b")}
        tensors |= {name: next(given_) for name in ("operand", "residual") if getattr(call, name) is not None}
        return replace(call, **tensors)(sliced_linear)

    assert torch.autograd.gradcheck(run, call.leaves)


@TYPES
@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "silu_mul"])
def test_activations_far_out_and_at_nan(dtype, activation):
    """Where exponentials over- or underflow, the functions are what they tend to; NaN stays."""
    x = torch.tensor([-1e4, -300.0, -90.0, -20.0, -6.0, -1e-3, 0.0, 1e-3, 6.0, 20.0, 300.0, 1e4], dtype=dtype)
    one = torch.ones_like(x)
    call = Call(x[:, None], torch.ones(1, 1, dtype=dtype), None, [], [], [], [0, 1], activation)
    call = replace(call, operand=one[:, None]) if activation == "silu_mul" else call
    close(call(sliced_linear), call.dense().nan_to_num(0.0), dtype)
    slope = call.trains()
    slope(sliced_linear).sum().backward()
    inner, exact = slice(3, -2), call.trains()
    exact.dense().sum().backward()
    close(slope.x.grad[inner], exact.x.grad[inner].double(), dtype)
    assert torch.equal(slope.x.grad[-1:, 0].round(), one[-1:]) and slope.x.grad[0, 0].abs() < 1e-6
    nan = replace(call, x=call.x * float("nan"))
    assert nan(sliced_linear).isnan().all()
