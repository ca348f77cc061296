"""The loss of a vocabulary's head without its logits, against the formula and against transformers' own losses."""

import itertools
import sys
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.profiler import profile
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.trainer_pt_utils import LabelSmoother

from mlfs import MLFSError
from mlfs.ops.distill import divergence
from mlfs.ops.head_loss import IGNORED, head_loss, head_loss_reference
from tests.calls import LAYOUTS, strided

MODULE = sys.modules["mlfs.ops.head_loss"]  # the package's own attribute of that name is the function


@dataclass(frozen=True)
class Head:
    """Arguments of one call."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    labels: Tensor
    teacher: Tensor | None
    alpha: float = 0.6
    temperature: float = 2.0
    smoothing: float = 0.1

    def __call__(self, op) -> tuple[Tensor, Tensor, Tensor]:
        return op(*vars(self).values())

    def to(self, dtype: torch.dtype) -> "Head":
        kinds = {k: v.to(dtype) for k, v in vars(self).items() if isinstance(v, Tensor) and k != "labels"}
        return replace(self, **kinds)

    def with_gradient(self, op, scale: float = 3.0) -> list[Tensor]:
        """[loss, task, divergence, dx of scale · loss]."""
        x = self.x.detach().requires_grad_()
        found = replace(self, x=x)(op)
        (found[0] * scale).backward()
        return [*(t.detach() for t in found), x.grad]


def example(
    shape: tuple[int, ...] = (2, 5),
    widths: tuple[int, int] = (6, 8),
    vocabulary: int = 11,
    layout: str = "plain",
    dtype: torch.dtype = torch.float64,
    ignored: float = 0.3,
    bias: bool = True,
    teacher: bool = True,
    seed: int = 0,
    **options: float,
) -> Head:
    generator = torch.Generator().manual_seed(seed)
    n, full = widths
    labels = torch.randint(vocabulary, shape, generator=generator)
    labels[torch.rand(shape, generator=generator) < ignored] = IGNORED
    return Head(
        strided((*shape, n), layout, generator, dtype),
        strided((vocabulary, full), layout, generator, dtype),
        strided((vocabulary,), layout, generator, dtype) if bias else None,
        labels,
        strided((*shape, full), layout, generator, dtype) if teacher else None,
        **options,
    )


@st.composite
def heads(draw, size: int = 9, vocabulary: int = 12, **options) -> Head:
    full = draw(st.integers(1, size))
    return example(
        tuple(draw(st.lists(st.integers(0, 5), max_size=2))),
        (draw(st.integers(1, full)), full),
        draw(st.integers(1, vocabulary)),
        draw(st.sampled_from(LAYOUTS)),
        ignored=draw(st.sampled_from([0.0, 0.4, 1.1])),
        bias=draw(st.booleans()),
        teacher=draw(st.booleans()),
        seed=draw(st.integers(0, 2**31)),
        alpha=draw(st.sampled_from([0.0, 0.3, 1.0])),
        temperature=draw(st.sampled_from([0.5, 1.0, 3.0])),
        smoothing=draw(st.sampled_from([0.0, 0.2])),
        **options,
    )


@pytest.fixture
def small_chunks(monkeypatch) -> None:
    """Chunks of three rows, or one, for a vocabulary of up to 64 numbers of 8 bytes."""
    monkeypatch.setattr(MODULE, "CHUNK_BYTES", dict.fromkeys(MODULE.CHUNK_BYTES, 3 * 64 * 8))


@given(heads())
def test_reference_is_the_formula(head):
    loss, task, distance = head(head_loss_reference)
    goal_task = goal_distance = 0.0
    for index in itertools.product(*map(range, head.labels.shape)):
        label = head.labels[index].item()
        if label == IGNORED:
            continue
        x = head.x[index]
        z = head.weight[:, : x.shape[0]] @ x + (0 if head.bias is None else head.bias)
        log_q = z - z.exp().sum().log()
        goal_task -= (1 - head.smoothing) * log_q[label].item() + head.smoothing * log_q.mean().item()
        if head.teacher is not None:
            u = head.weight @ head.teacher[index] + (0 if head.bias is None else head.bias)
            p, r = ((t / head.temperature).exp() for t in (u, z))
            p, r = p / p.sum(), r / r.sum()
            goal_distance += head.temperature**2 * (p * (p / r).log()).sum().item()
    alpha = 0.0 if head.teacher is None else head.alpha
    assert task.item() == pytest.approx(goal_task, rel=1e-9, abs=1e-9)
    assert distance.item() == pytest.approx(goal_distance, rel=1e-9, abs=1e-9)
    assert loss.item() == pytest.approx((1 - alpha) * goal_task + alpha * goal_distance, rel=1e-9, abs=1e-9)


@given(heads())
def test_operator_equals_the_reference_whatever_the_chunks(head):
    goal = head.with_gradient(head_loss_reference)
    for rows in (1, 3, 1000):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(MODULE, "CHUNK_BYTES", dict.fromkeys(MODULE.CHUNK_BYTES, rows * 64 * 8))
            torch.testing.assert_close(head.with_gradient(head_loss), goal, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(list(head(head_loss)), goal[:3], rtol=1e-9, atol=1e-9)  # without a gradient


@pytest.mark.parametrize("options", [{}, {"teacher": False}, {"bias": False}, {"temperature": 1.0, "smoothing": 0.0}])
def test_gradcheck(small_chunks, options):
    head = example(**options)
    x = head.x.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: replace(head, x=x)(head_loss)[0], (x,))
    _, task, distance = replace(head, x=x)(head_loss)
    assert not task.requires_grad and not distance.requires_grad


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_task_is_transformers_causal_loss_and_its_label_smoother(smoothing):
    head = example(shape=(2, 7), smoothing=smoothing, teacher=False)
    logits = torch.nn.functional.linear(head.x, head.weight[:, :6], head.bias)
    shifted = torch.nn.functional.pad(head.labels, (0, 1), value=IGNORED)[:, 1:]
    _, task, _ = replace(head, labels=shifted)(head_loss)
    items = shifted.ne(IGNORED).sum()
    if smoothing:
        goal = LabelSmoother(smoothing)({"logits": logits}, head.labels, shift_labels=True)
    else:
        goal = ForCausalLMLoss(logits, head.labels, head.weight.shape[0])
    torch.testing.assert_close(task / items, goal.double(), rtol=1e-6, atol=0)  # theirs is taken in float32


def test_divergence_is_that_of_the_logits():
    head = example(smoothing=0.0)
    z, u = (torch.nn.functional.linear(h, head.weight[:, : h.shape[-1]], head.bias) for h in (head.x, head.teacher))
    kept = head.labels.ne(IGNORED)
    torch.testing.assert_close(head(head_loss)[2], divergence(z, u, kept, 2.0) * kept.sum())


def test_ignored_rows_do_not_count_whatever_they_hold(small_chunks):
    head = example()
    goal = head.with_gradient(head_loss)
    ignored = head.labels.eq(IGNORED)
    wild = replace(head, x=head.x.clone(), teacher=head.teacher.clone())
    wild.x[ignored] = wild.teacher[ignored] = float("nan")
    found = wild.with_gradient(head_loss)
    torch.testing.assert_close(found, goal)
    assert not found[3][ignored].any() and found[3][~ignored].all()


@pytest.mark.parametrize("head", [example(shape=(0,)), example(shape=(2, 0)), example(ignored=1.1)])
def test_no_row_that_counts_is_zero_with_a_zero_gradient(head):
    *sums, dx = head.with_gradient(head_loss)
    assert all(t.item() == 0 for t in sums)
    assert dx.shape == head.x.shape and not dx.any()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("teacher", [False, True])
def test_what_lies_in_fresh_memory_does_not_count(dtype, teacher):
    """Rows of an odd vocabulary are padded; oneDNN's bf16 products on AMX read the padding."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)  # fills memory that is not written with NaN
    try:
        for tokens, vocabulary in ((17, 61), (40, 61), (40, 1027)):
            head = example((tokens,), (48, 64), vocabulary, dtype=torch.float32, teacher=teacher, ignored=0.0)
            found = head.to(dtype).with_gradient(head_loss)
            assert all(t.isfinite().all() for t in found)
    finally:
        torch.use_deterministic_algorithms(before)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 6e-2), (torch.float16, 1e-2)])
def test_sums_are_taken_in_fp32(dtype, tolerance):
    head = example(shape=(40,), vocabulary=301, widths=(24, 32), dtype=torch.float32).to(dtype)
    found, goal = head.with_gradient(head_loss), head.to(torch.float64).with_gradient(head_loss_reference)
    assert [t.dtype for t in found] == [torch.float32] * 3 + [dtype]
    for mine, right in zip(found, goal, strict=True):
        assert (mine.double() - right).abs().max() <= tolerance * right.abs().max()


def test_equal_distributions_are_nothing_apart():
    head = example(widths=(8, 8))
    assert replace(head, teacher=head.x)(head_loss)[2].item() == pytest.approx(0, abs=1e-12)


def test_autocast_makes_logits_in_its_type():
    head = example(dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = head.with_gradient(head_loss)
    half = replace(head, x=head.x.bfloat16())
    torch.testing.assert_close(found[:3], half.with_gradient(head_loss)[:3], rtol=0, atol=0)
    assert found[3].dtype == torch.float32


def test_a_gradient_that_is_scaled_for_fp16_is_not_lost():
    """Divided by a million tokens before it is made, dz would round to zero."""
    head = example(shape=(30,), vocabulary=50, dtype=torch.float32, ignored=0.0).to(torch.float16)
    x = head.x.clone().requires_grad_()
    (replace(head, x=x)(head_loss)[0] / 1e6 * 2**16).backward()
    goal = head.to(torch.float64).with_gradient(head_loss_reference, 2**16 / 1e6)[3]
    assert (x.grad.double() - goal).abs().max() <= 1e-2 * goal.abs().max()


def test_no_tensor_is_as_large_as_the_logits(monkeypatch):
    for backend in ("reference", "cpp"):
        monkeypatch.setitem(MODULE.CHUNK_BYTES, backend, 1 << 20)
    head = example(shape=(1500,), vocabulary=2000, widths=(24, 32), dtype=torch.float32)

    def largest(op) -> int:
        with profile(profile_memory=True) as recorded:
            head.with_gradient(op)
        events = recorded.profiler.kineto_results.events()
        return max(event.nbytes() for event in events if event.name() == "[memory]")

    logits = head.labels.ne(IGNORED).sum().item() * 2000 * 4
    assert largest(head_loss_reference) >= logits > 8 << 20
    assert largest(head_loss) <= 1 << 20


@pytest.mark.parametrize("change", [{"labels": torch.zeros(2, 4, dtype=torch.int64)}, {"x": torch.zeros(2, 5, 9)},
                                    {"teacher": torch.zeros(2, 5, 6)}])  # fmt: skip
def test_shapes_that_do_not_fit_are_refused(change):
    with pytest.raises(MLFSError, match="expected"):
        replace(example(dtype=torch.float32), **change)(head_loss)


@pytest.mark.parametrize("options", [{}, {"teacher": False, "bias": False}])
@pytest.mark.parametrize("keep", [True, False])
def test_opcheck(options, keep):
    head = example(**options)
    arguments = [v.requires_grad_(keep) if name == "x" else v for name, v in vars(head).items()]
    torch.library.opcheck(torch.ops.mlfs.head_loss.default, (*arguments, keep))
