"""The distillation kernels, in Triton's interpreter or on a GPU, against the references in float64."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

pytest.importorskip("triton")
from mlfs.kernels import distill
from mlfs.ops.backend import use_backend
from mlfs.ops.distill import feature_distance, feature_distance_reference
from mlfs.ops.head_loss import IGNORED, head_loss, head_loss_reference
from tests.calls import strided
from tests.ops.test_head_loss import MODULE, Head, example, heads


@pytest.fixture(autouse=True)
def kernels(poisoned_memory):
    with use_backend("triton"):
        yield


def agree(head: Head, tolerance: float) -> None:
    found = head.with_gradient(head_loss)
    goal = head.to(torch.float64).with_gradient(head_loss_reference)
    for mine, right in zip(found, goal, strict=True):
        assert mine.shape == right.shape
        largest = max(right.abs().max().item(), 1.0) if right.numel() else 1.0
        assert right.numel() == 0 or (mine.double() - right).abs().max() <= tolerance * largest


@settings(max_examples=40)
@given(heads(dtype=torch.float32))
def test_head_loss_equals_the_formula(head):
    agree(head, 1e-4)


@pytest.mark.parametrize("options", [{}, {"teacher": False}, {"temperature": 1.0}, {"smoothing": 0.0}, {"alpha": 1.0}])
@pytest.mark.parametrize("vocabulary", [1, 513, 2048, 4999])
def test_head_loss_across_blocks_of_the_vocabulary(vocabulary, options):
    agree(example((7,), (16, 24), vocabulary, dtype=torch.float32, **options), 1e-4)


def test_head_loss_across_chunks_of_rows(monkeypatch):
    monkeypatch.setitem(MODULE.CHUNK_BYTES, "triton", 3 * 64 * 4)
    agree(example((2, 11), dtype=torch.float32), 1e-4)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float16, 1e-2), (torch.bfloat16, 6e-2)])
def test_head_loss_of_half_precision(dtype, tolerance):
    agree(example((20,), (24, 32), 301, dtype=torch.float32).to(dtype), tolerance)


@pytest.mark.parametrize("stride", [101, 112, 160])
@pytest.mark.parametrize("far", [1.0, 1e4])
def test_rows_of_logits_one_by_one(stride, far):
    """Also far apart, and in memory where rows end at multiples of 16 or anywhere."""
    generator = torch.Generator().manual_seed(0)
    z, u = (torch.full((5, stride), float("nan")) for _ in range(2))
    z[:, :101], u[:, :101] = (far * torch.randn(5, 101, generator=generator) for _ in range(2))
    labels = torch.tensor([3, IGNORED, 100, 0, 101])
    z[1] = u[1] = float("nan")
    exact = z[:4:, :101].double().index_select(0, torch.tensor([0, 2, 3])).requires_grad_()
    goal = torch.nn.functional.cross_entropy(exact, labels[[0, 2, 3]], reduction="none", label_smoothing=0.2)
    log_p, log_r = (torch.log_softmax(t / 2, -1) for t in (u[[0, 2, 3], :101].double(), exact))
    apart = 4 * (log_p.exp() * (log_p - log_r)).sum(-1)
    (0.3 * goal + 0.7 * apart).sum().backward()
    sums = torch.full((2, 5), float("nan"))
    distill.head_rows(z[:, :101], u[:, :101], labels, sums, 0.7, 2.0, 0.2, True)
    torch.testing.assert_close(sums[:, [0, 2, 3]].double(), torch.stack([goal, apart]).detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(z[[0, 2, 3], :101].double(), exact.grad, rtol=1e-4, atol=1e-5)
    assert not sums[:, 1].any() and not z[1, :101].any()
    assert sums[0, 4].isnan()  # 101 is no label
    assert z[:, 112:].isnan().all()  # of others
    before = torch.full((2, 4), 7.0)
    distill.head_rows(z[:4, :101], None, labels[:4], before, 0.0, 1.0, 0.0, False)
    assert (before[1] == 7).all() and before[0].isfinite().all()


def test_head_loss_ignores_rows_that_hold_no_numbers():
    head = example(dtype=torch.float32)
    ignored = head.labels.eq(IGNORED)
    wild = replace(head, x=head.x.clone(), teacher=head.teacher.clone())
    wild.x[ignored] = wild.teacher[ignored] = float("nan")
    found = wild.with_gradient(head_loss)
    torch.testing.assert_close(found, head.with_gradient(head_loss))
    assert not found[3][ignored].any()


@pytest.mark.parametrize("head", [example(shape=(0,), dtype=torch.float32), example(ignored=1.1, dtype=torch.float32)])
def test_head_loss_of_no_rows_is_zero(head):
    *sums, dx = head.with_gradient(head_loss)
    assert all(t.item() == 0 for t in sums) and not dx.any() and dx.shape == head.x.shape


def features(
    tokens: int, n: int, full: int, size: int, dtype: torch.dtype = torch.float32, layout: str = "plain"
) -> tuple[Tensor, ...]:
    """student, teacher, projection and mask."""
    generator = torch.Generator().manual_seed(tokens)
    student, teacher = (strided((tokens, width), layout, generator, dtype) for width in (n, full))
    projection = strided((size, full), layout, generator, torch.float32) / full**0.5
    return student, teacher, projection, torch.rand(tokens, generator=generator) < 0.7


def distance_and_gradients(op, case: tuple[Tensor, ...], masked: bool, learned: bool) -> list[Tensor]:
    student, teacher, projection, mask = (t.detach().clone() for t in case)
    student.requires_grad_(), projection.requires_grad_(learned)
    value = op(student, teacher, projection, mask if masked else None)
    (3 * value).backward()
    return [value.detach(), student.grad, *([projection.grad] if learned else [])]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("layout", ["plain", "transposed"])
@pytest.mark.parametrize("sizes", [(1, 1, 1, 1), (33, 20, 31, 7), (70, 130, 150, 64), (40, 64, 128, 80)])
def test_feature_distance_equals_the_formula(sizes, layout, learned, masked):
    case = features(*sizes, layout=layout)
    found = distance_and_gradients(feature_distance, case, masked, learned)
    exact = tuple(t.double() if t.is_floating_point() else t for t in case)
    goal = distance_and_gradients(feature_distance_reference, exact, masked, learned)
    for mine, right in zip(found, goal, strict=True):
        assert mine.dtype == torch.float32
        assert (mine.double() - right).abs().max() <= 1e-5 * right.abs().max().clamp_min(1e-3)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float16, 2e-3), (torch.bfloat16, 2e-2)])
def test_feature_distance_of_half_precision(dtype, tolerance):
    case = features(50, 40, 48, 16, dtype)
    found = distance_and_gradients(feature_distance, case, True, True)
    exact = tuple(t.double() if t.is_floating_point() else t for t in case)
    goal = distance_and_gradients(feature_distance_reference, exact, True, True)
    assert [t.dtype for t in found] == [torch.float32, dtype, torch.float32]
    for mine, right in zip(found, goal, strict=True):
        assert (mine.double() - right).abs().max() <= tolerance * right.abs().max()


@pytest.mark.parametrize("tokens", [0, 5])
def test_feature_distance_of_no_rows_is_zero(tokens):
    student, teacher, projection, mask = features(tokens, 6, 8, 4)
    for learned in (False, True):
        value, *gradients = distance_and_gradients(
            feature_distance, (student, teacher, projection, torch.zeros_like(mask)), True, learned
        )
        assert value.item() == 0 and not any(g.any() for g in gradients)


def test_feature_distance_ignores_rows_that_hold_no_numbers():
    student, teacher, projection, mask = features(20, 6, 8, 4)
    goal = distance_and_gradients(feature_distance, (student, teacher, projection, mask), True, False)
    student[~mask], teacher[~mask] = float("nan"), float("inf")
    found = distance_and_gradients(feature_distance, (student, teacher, projection, mask), True, False)
    assert all(torch.equal(a, b) for a, b in zip(found, goal, strict=True)) and not found[1][~mask].any()


def test_results_are_the_same_on_every_run():
    head, case = example((30,), (24, 32), 301, dtype=torch.float32), features(70, 30, 40, 16)
    for run in (
        lambda: head.with_gradient(head_loss),
        lambda: distance_and_gradients(feature_distance, case, True, True),
    ):
        first, second = run(), run()
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
