"""The compiled operators for CPUs, in every instruction set this processor has, against formulas in float64."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from mlfs import MLFSError
from mlfs.elastic.linear import ElasticLinear
from mlfs.ops import backend
from mlfs.ops.attention import ragged_attention, ragged_attention_reference, ranges_of_keys, ranges_of_sequences
from mlfs.ops.backend import use_backend
from mlfs.ops.head_loss import IGNORED, head_loss, head_loss_reference
from mlfs.ops.joint_linear import Projection, joint_linear, joint_linear_reference
from mlfs.ops.norm import add_norm, add_norm_reference
from mlfs.ops.rotary import rotary, rotary_reference
from mlfs.ops.sliced_linear import sliced_linear
from tests.calls import EXAMPLES, Call, calls, strided

cpu = pytest.importorskip("mlfs._cpu", reason="the C++ extension is not built")
BEST = cpu.limit_instructions(2)
TOLERANCE = {torch.float32: 2e-5, torch.float64: 1e-11}
TYPES = pytest.mark.parametrize("dtype", TOLERANCE, ids=["fp32", "fp64"])


@pytest.fixture(autouse=True, scope="module", params=[0, 1, 2])
def instructions(request):
    """Each instruction set in turn; a processor without it takes the next lower one, once."""
    found = cpu.limit_instructions(request.param)
    if found != ("plain", "avx2", "avx512")[request.param]:
        pytest.skip(f"this processor has {BEST} at best")
    torch.use_deterministic_algorithms(True)  # fills new tensors with NaN, too
    with use_backend("cpp"):
        yield found
    torch.use_deterministic_algorithms(False)
    cpu.limit_instructions(2)


def close(mine: Tensor, right: Tensor, dtype: torch.dtype, scale: float = 1.0) -> None:
    """To rounding, relative to the largest number: what cancels is only as good as what it is the difference of."""
    assert mine.dtype == dtype
    assert mine.shape == right.shape
    if right.numel():
        largest = max(right.abs().amax().item(), 1.0)
        assert (mine.double() - right).abs().amax().item() <= TOLERANCE[dtype] * largest * scale


# ---- sliced product -------------------------------------------------------------------------------------------------


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
    [(700, 2100, 70, 1), (530, 40, 2100, 1), (40, 30, 50, 35), (33, 5000, 1, 0), (1, 4099, 33, 2), (3, 33, 4099, 2)],
)
def test_the_sliced_product_at_the_limits_of_its_blocks(dtype, tokens, n, m, stages):
    """Sums too deep to be packed at once, more rows than wait for them, more pieces than are read together."""
    generator = torch.Generator().manual_seed(0)

    def some(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=dtype) / shape[-1] ** 0.5

    lora = [some(2, n + 3) for _ in range(stages)], [some(m + 5, 2) for _ in range(stages)], [0.5] * stages
    agree(Call(some(tokens, n), some(m + 5, n + 3), some(m + 5), *lora, [0, m]))


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
        layers.append(Projection(some(m + 2, n + 1), some(m + 2), *lora, m))
    outcomes = []
    for kind, op in ((dtype, joint_linear), (torch.float64, joint_linear_reference)):
        mine = x.detach().to(kind).requires_grad_()
        kept, leaves = [], [mine]
        for w, b, lora_a, lora_b, scales, m in layers:
            pairs = [
                [t.detach().to(kind).requires_grad_(s == trained) for s, t in enumerate(ts)] for ts in (lora_a, lora_b)
            ]
            kept.append(Projection(w.to(kind), b.to(kind), *pairs, scales, m))
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


# ---- norms ----------------------------------------------------------------------------------------------------------


def mask_of(shape: tuple[int, ...], p: float, seed: int, dtype: torch.dtype) -> Tensor:
    rows = math.prod(shape[:-1])
    return (cpu.dropout_mask(rows, shape[-1], p, seed) > 0).to(dtype).view(shape) / (1 - p)


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


# ---- dropout --------------------------------------------------------------------------------------------------------


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
        z = sliced_linear(stage[0], w, None, [stage[1]], [stage[2]], [1.5], [0, 140])
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


# ---- attention ------------------------------------------------------------------------------------------------------


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


# ---- rotary embeddings ----------------------------------------------------------------------------------------------


@TYPES
@settings(max_examples=40)
@given(data=st.data())
def test_rotary_embeddings_equal_the_formula(dtype, data):
    rows, tokens, heads, kv_heads = (data.draw(st.integers(0, 4)) for _ in range(4))
    dim, shared = 2 * data.draw(st.integers(1, 25)), data.draw(st.booleans())
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    layouts = st.sampled_from(["plain", "inside", "transposed", "expanded"])
    shapes = [(rows, tokens, heads, dim), (rows, tokens, kv_heads, dim), *[(1 if shared else rows, tokens, dim)] * 2]
    given_ = [strided(shape, data.draw(layouts), generator, dtype) for shape in shapes]
    mine = [t.detach().clone().requires_grad_() for t in given_[:2]]
    exact = [t.detach().double().requires_grad_() for t in given_[:2]]
    found, goal = rotary(*mine, *given_[2:]), rotary_reference(*exact, *(t.double() for t in given_[2:]))
    with torch.no_grad():
        direct = rotary(*given_)
    for a, b, c in zip(found, direct, goal, strict=True):
        close(a.detach(), c.detach(), dtype)
        assert torch.equal(a, b)
    slopes = [torch.randn(t.shape, generator=generator, dtype=dtype) for t in found]
    torch.autograd.backward(found, slopes)
    torch.autograd.backward(goal, [t.double() for t in slopes])
    for a, b in zip(mine, exact, strict=True):
        close(a.grad, b.grad, dtype)


# ---- loss of a head -------------------------------------------------------------------------------------------------


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


# ---- dispatch -------------------------------------------------------------------------------------------------------


def test_types_it_does_not_take_are_refused_when_forced_and_go_elsewhere_when_not(monkeypatch):
    half = torch.ones(2, 3, dtype=torch.bfloat16)
    with pytest.raises(MLFSError, match="backend cpp: tensors of bfloat16; expected all float32"):
        add_norm(half, None, None, None, 1e-5, True)
    with pytest.raises(MLFSError, match="backend cpp: tensors of float32, float64"):
        add_norm(half.float(), half.double(), None, None, 1e-5, True)
    monkeypatch.setattr(backend, "_forced", None)

    assert backend.backend_of(half) == backend.backend_of(half.double()) == "reference"
    assert backend.backend_of(half.float(), half) == "reference"
    assert backend.backend_of(half.float(), None, half.float()) == "cpp"
    monkeypatch.setattr(backend, "why_no_cpp", lambda: "there is no compiler")
    assert backend.backend_of(half.float()) == "reference"
    with pytest.raises(MLFSError, match="backend cpp is not available: there is no compiler"), use_backend("cpp"):
        pass


def test_without_gradients_the_operator_is_called_directly():
    layer = nn.Linear(20, 30).requires_grad_(False)
    call = Call(torch.randn(4, 20), layer.weight, layer.bias, [], [], [], [0, 30])
    with torch.inference_mode():
        torch.testing.assert_close(call(sliced_linear), layer(call.x))
    assert call(sliced_linear).grad_fn is None


def test_what_does_not_fit_is_refused_where_no_operator_is_between():
    """The kernels would read beyond the end of it."""
    layer = ElasticLinear.from_linear(nn.Linear(20, 30), rank=2)
    x, y = torch.randn(4, 20), torch.randn(4, 30)
    with torch.no_grad():
        with pytest.raises(MLFSError, match="only silu_mul takes an operand"):
            layer(x, activation="silu_mul")
        with pytest.raises(MLFSError, match="expected one of none"):
            layer(x, activation="relu")
        with pytest.raises(RuntimeError, match="operand or residual of"):
            layer(x, residual=y[:2])
        with pytest.raises(RuntimeError, match="differ in shape"):
            add_norm(x, x[:2], None, None, 1e-5, True)
        with pytest.raises(RuntimeError, match="shorter than rows"):
            add_norm(x, None, torch.ones(19), None, 1e-5, True)
