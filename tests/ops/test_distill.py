"""The two distances of distillation, against their formulas."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mlfs import MLFSError
from mlfs.ops.distill import divergence, feature_distance, feature_distance_reference


def randn(*size: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@st.composite
def rows(draw) -> tuple[tuple[int, ...], Tensor, int]:
    """Leading sizes, a mask of them, and a seed."""
    leading = tuple(draw(st.lists(st.integers(1, 4), max_size=2)))
    seed = draw(st.integers(0, 2**31))
    generator = torch.Generator().manual_seed(seed)
    return leading, torch.rand(leading, generator=generator) < draw(st.sampled_from([0.3, 0.8, 1.1])), seed


@given(rows(), st.integers(1, 7), st.sampled_from([0.5, 1.0, 4.0]))
def test_divergence_is_its_formula(case, vocabulary, temperature):
    leading, mask, seed = case
    student, teacher = randn(*leading, vocabulary, seed=seed), randn(*leading, vocabulary, seed=seed + 1)
    value = divergence(student, teacher, mask, temperature)
    total, count = 0.0, 0
    for q_row, p_row, keep in zip(
        student.reshape(-1, vocabulary).tolist(),
        teacher.reshape(-1, vocabulary).tolist(),
        mask.reshape(-1),
        strict=True,
    ):
        if keep:
            p = [math.exp(v / temperature) for v in p_row]
            q = [math.exp(v / temperature) for v in q_row]
            pairs = zip([v / sum(p) for v in p], [v / sum(q) for v in q], strict=True)
            total, count = total + sum(a * math.log(a / b) for a, b in pairs), count + 1
    assert value.shape == ()
    assert value.item() == pytest.approx(temperature**2 * total / max(count, 1), rel=1e-9, abs=1e-12)


def test_divergence_without_mask_counts_every_row():
    student, teacher = randn(2, 3, 5), randn(2, 3, 5, seed=1)
    everything = torch.ones(2, 3, dtype=torch.bool)
    assert torch.equal(divergence(student, teacher), divergence(student, teacher, everything))
    expected = torch.nn.functional.kl_div(
        student.log_softmax(-1).view(6, 5), teacher.log_softmax(-1).view(6, 5), log_target=True, reduction="batchmean"
    )
    torch.testing.assert_close(divergence(student, teacher), expected)


@given(rows(), st.integers(2, 6))
def test_divergence_is_positive_and_zero_for_equal_distributions(case, vocabulary):
    leading, mask, seed = case
    student, teacher = randn(*leading, vocabulary, seed=seed), randn(*leading, vocabulary, seed=seed + 1)
    assert divergence(student, student + 3.0, mask).item() == pytest.approx(0, abs=1e-12)
    assert divergence(student, teacher, mask).item() > 0 or not mask.any()


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_divergence_gradcheck_of_the_student(temperature):
    student, teacher = randn(2, 3, 5).requires_grad_(), randn(2, 3, 5, seed=1)
    mask = torch.tensor([[True, True, False], [True, False, False]])
    assert torch.autograd.gradcheck(lambda s: divergence(s, teacher, mask, temperature), (student,))
    divergence(student, teacher, mask, temperature).backward()
    assert not student.grad[~mask].any() and student.grad[mask].all()


def test_ignored_rows_do_not_count_whatever_they_hold():
    student, teacher, mask = randn(4, 5), randn(4, 5, seed=1), torch.tensor([True, False, True, True])
    wild = student.clone()
    wild[1] = 1e30
    assert torch.equal(divergence(wild, teacher, mask), divergence(student, teacher, mask))
    projection = randn(3, 5, seed=2)
    assert torch.equal(
        feature_distance(wild, teacher, projection, mask), feature_distance(student, teacher, projection, mask)
    )


def test_teacher_gets_no_gradient():
    student, teacher = randn(4, 5).requires_grad_(), randn(4, 5, seed=1).requires_grad_()
    projection = randn(3, 5, seed=2).requires_grad_()
    (divergence(student, teacher) + feature_distance(student, teacher, projection)).backward()
    assert teacher.grad is None
    assert student.grad is not None and projection.grad is not None


@pytest.mark.parametrize("empty", ["masked", "no rows"])
def test_nothing_to_compare_is_zero_with_zero_gradients(empty):
    tokens = 4 if empty == "masked" else 0
    mask = torch.zeros(tokens, dtype=torch.bool)
    student = randn(tokens, 5, dtype=torch.float32).requires_grad_()
    teacher, projection = randn(tokens, 5, dtype=torch.float32), randn(3, 5, dtype=torch.float32)
    for value in (divergence(student, teacher, mask), feature_distance(student, teacher, projection, mask)):
        student.grad = None
        value.backward()
        assert value.item() == 0
        assert student.grad is not None and not student.grad.any()


@pytest.mark.parametrize(
    ("student", "teacher", "expected"),
    [
        (torch.bfloat16, torch.bfloat16, torch.float32),
        (torch.bfloat16, torch.float32, torch.float32),
        (torch.float32, torch.float64, torch.float64),
    ],
)
def test_distances_are_summed_in_fp32_or_wider(student, teacher, expected):
    a, b, projection = randn(9, 64, dtype=student), randn(9, 64, seed=1, dtype=teacher), randn(8, 64, seed=2)
    value = divergence(a, b)
    assert value.dtype == expected
    torch.testing.assert_close(value.double(), divergence(a.double(), b.double()), rtol=1e-5, atol=0)
    value = feature_distance(a, b, projection.to(teacher))
    assert value.dtype == expected
    torch.testing.assert_close(value.double(), feature_distance(a.double(), b.double(), projection), rtol=2e-2, atol=0)


def test_divergence_of_far_apart_logits_is_finite():
    student, teacher = torch.tensor([[1e4, 0.0, -1e4]], requires_grad=True), torch.tensor([[-1e4, 0.0, 1e4]])
    value = divergence(student, teacher)
    value.backward()
    assert value.item() == pytest.approx(2e4)
    assert torch.isfinite(student.grad).all()


@given(
    rows(), st.integers(1, 6).flatmap(lambda full: st.tuples(st.just(full), st.integers(1, full))), st.integers(1, 4)
)
def test_feature_distance_is_its_formula(case, widths, size):
    leading, mask, seed = case
    full, n = widths
    student, teacher, projection = (
        randn(*leading, n, seed=seed),
        randn(*leading, full, seed=seed + 1),
        randn(size, full),
    )
    value = feature_distance(student, teacher, projection, mask)
    above = below = 0.0
    for s, t, keep in zip(student.reshape(-1, n), teacher.reshape(-1, full), mask.reshape(-1), strict=True):
        if keep:
            mine = [sum(projection[i, j].item() * s[j].item() for j in range(n)) for i in range(size)]
            goal = [sum(projection[i, j].item() * t[j].item() for j in range(full)) for i in range(size)]
            above += sum((a - b) ** 2 for a, b in zip(mine, goal, strict=True))
            below += sum(b**2 for b in goal)
    assert value.item() == pytest.approx(above / below if below else 0.0, rel=1e-8)


def test_feature_distance_does_not_depend_on_the_scale_of_the_model():
    student, teacher, projection = randn(6, 4), randn(6, 5, seed=1), randn(3, 5, seed=2)
    value = feature_distance(student, teacher, projection)
    torch.testing.assert_close(feature_distance(100 * student, 100 * teacher, projection), value)
    assert feature_distance(teacher, teacher, projection).item() == 0


def test_feature_distance_gradcheck_of_the_student():
    student, teacher, projection = randn(2, 3, 4).requires_grad_(), randn(2, 3, 5, seed=1), randn(3, 5, seed=2)
    mask = torch.tensor([[True, True, False], [True, False, True]])
    assert torch.autograd.gradcheck(lambda s: feature_distance(s, teacher, projection, mask), (student,))


def test_projection_learns_from_both_sides_of_the_difference():
    student, teacher, projection = randn(6, 4), randn(6, 5, seed=1), randn(3, 5, seed=2).requires_grad_()
    feature_distance(student, teacher, projection).backward()
    plain = projection.detach().clone().requires_grad_()
    goal = teacher @ plain.T
    ((student @ plain[:, :4].T - goal) ** 2).sum().div((goal.detach() ** 2).sum()).backward()
    torch.testing.assert_close(projection.grad, plain.grad)


@pytest.mark.parametrize("learned", [False, True])
@given(
    rows(), st.integers(1, 6).flatmap(lambda full: st.tuples(st.just(full), st.integers(1, full))), st.integers(1, 4)
)
def test_feature_distance_and_its_gradients_equal_the_reference(learned, case, widths, size):
    leading, mask, seed = case
    full, n = widths
    teacher = randn(*leading, full, seed=seed + 1)
    found = []
    for op in (feature_distance, feature_distance_reference):
        student, projection = randn(*leading, n, seed=seed), randn(size, full)
        value = op(student.requires_grad_(), teacher, projection.requires_grad_(learned), mask)
        (3 * value).backward()
        found.append([value.detach(), student.grad, *([projection.grad] if learned else [])])
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-9)


def test_feature_distance_ignores_rows_that_hold_no_numbers():
    student, teacher, projection = randn(4, 4), randn(4, 5, seed=1), randn(3, 5, seed=2)
    mask = torch.tensor([True, False, True, True])
    goal = feature_distance(student, teacher, projection, mask)
    student[1], teacher[1] = float("nan"), float("inf")
    student.requires_grad_()
    value = feature_distance(student, teacher, projection, mask)
    value.backward()
    assert torch.equal(value, goal)
    assert not student.grad[1].any() and student.grad[mask].all()


def test_feature_distance_takes_a_mask_of_ones_and_zeros():
    student, teacher, projection, mask = (
        randn(4, 4),
        randn(4, 5, seed=1),
        randn(3, 5, seed=2),
        torch.tensor([1, 0, 1, 1]),
    )
    found = feature_distance(student, teacher, projection, mask)
    assert torch.equal(found, feature_distance(student, teacher, projection, mask.bool()))


@pytest.mark.parametrize("shapes", [((4, 5), (3, 5), (2, 5), (4,)), ((4, 6), (4, 5), (2, 5), (4,)),
                                    ((4, 3), (4, 5), (2, 6), (4,)), ((4, 3), (4, 5), (2, 5), (3,))])  # fmt: skip
def test_feature_distance_refuses_shapes_that_do_not_fit(shapes):
    with pytest.raises(MLFSError, match="expected"):
        feature_distance(*(torch.ones(shape) for shape in shapes))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("learned", [False, True])
def test_feature_distance_opcheck(masked, learned):
    student, teacher, projection = randn(2, 3, 4).requires_grad_(), randn(2, 3, 5, seed=1), randn(3, 5, seed=2)
    mask = torch.tensor([[True, True, False], [True, False, True]]) if masked else None
    ops = torch.ops.mlfs
    torch.library.opcheck(
        ops.feature_distance.default, (student, teacher, projection.requires_grad_(learned), mask, True)
    )
    torch.library.opcheck(ops.feature_distance.default, (student.detach(), teacher, projection.detach(), mask, False))
    d, scale, given_ = randn(6, 3), torch.tensor(0.5).double(), (student.detach(), teacher) if learned else (None, None)
    for needs_dx in (True, False):
        torch.library.opcheck(
            ops.feature_distance_backward.default,
            (scale, d, projection.detach(), *given_, 4, torch.float64, needs_dx),
        )
