"""What a subnet learns from maxnet: a divergence of output distributions and a distance of hidden states.

    divergence       = T² · Σ_v p_v (log p_v − log q_v),   p = softmax(teacher / T), q = softmax(student / T)
    feature_distance = ‖h_student · P[:, :n]ᵀ − h_teacher · Pᵀ‖² / ‖h_teacher · Pᵀ‖²

averaged over the rows that `mask` keeps (Hinton et al., arXiv 1503.02531; arXiv 2404.01353, section 3). The second
is relative to the teacher's size, so that one weight β suits models whose hidden states differ by orders of magnitude.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mlfs.errors import MLFSError
from mlfs.ops.autograd import differentiable, flat_rows, tokens_of, wanted_if
from mlfs.ops.backend import run, runs_as_operators
from mlfs.ops.backends.table import implements

__all__ = ["divergence", "feature_distance", "feature_distance_reference"]


def divergence(student: Tensor, teacher: Tensor, mask: Tensor | None = None, temperature: float = 1.0) -> Tensor:
    """Computes the mean KL(teacher ‖ student) over rows, times T²: a float32 (or float64) scalar.

    Args:
        student, teacher: logits (..., V); the teacher's are constants.
        mask: (...,) bool, rows that count; None for all. No row at all gives 0.
    """
    student, teacher = _widened(student, teacher.detach())
    weight = _weights(student, mask)
    log_p = torch.log_softmax(teacher / temperature, dim=-1)  # (..., V)
    log_q = torch.log_softmax(student / temperature, dim=-1)
    of_rows = (log_p.exp() * (log_p - log_q)).sum(-1)  # (...)
    return temperature**2 * (of_rows * weight).sum() / weight.sum().clamp_min(1)


def feature_distance_reference(
    student: Tensor, teacher: Tensor, projection: Tensor, mask: Tensor | None = None
) -> Tensor:
    """Computes the formula in plain, differentiable PyTorch."""
    columns = student.shape[-1]
    teacher = teacher.detach()
    of_teacher = teacher @ projection.to(teacher.dtype).t()  # (..., p)
    of_student = student @ projection[:, :columns].to(student.dtype).t()
    of_student, of_teacher = _widened(of_student, of_teacher)
    weight = _weights(of_student, mask)
    distance = ((of_student - of_teacher).pow(2).sum(-1) * weight).sum()
    size = (of_teacher.detach().pow(2).sum(-1) * weight).sum()
    return distance / size.clamp_min(torch.finfo(size.dtype).tiny)


def feature_distance(student: Tensor, teacher: Tensor, projection: Tensor, mask: Tensor | None = None) -> Tensor:
    """Computes the relative squared distance of projected hidden states: a float32 (or float64) scalar.

    Has gradients in student and, if it trains, projection; the divisor counts as constant.

    Args:
        student: (..., n). teacher: (..., N), n ≤ N, constant.
        projection: (p, N); the student is read by its leading n columns.
        mask: (...,) bool, rows (tokens) that count; None for all.

    Raises:
        MLFSError: shapes that do not fit together.
    """
    leading, columns, full = student.shape[:-1], student.shape[-1], projection.shape[1]
    mask_fits = mask is None or mask.shape == leading
    if teacher.shape != (*leading, full) or columns > full or not mask_fits:
        shapes = ", ".join(str(tuple(t.shape)) for t in (student, teacher, projection, mask) if t is not None)
        raise MLFSError(
            f"student, teacher, projection and mask of {shapes}: expected (..., n), (..., N), (p, N), (...)"
        )
    if not runs_as_operators():
        return feature_distance_reference(student, teacher, projection, mask)
    keep = torch.is_grad_enabled() and (student.requires_grad or projection.requires_grad)
    if mask is not None:
        mask = mask.bool()
    return _feature_distance(student, teacher.detach(), projection, mask, keep)[0]


# ---- what backends implement, on 2-d tensors -------------------------------------------------------------------------


@implements("reference", "feature_difference")
def _feature_difference(
    student: Tensor, teacher: Tensor, projection: Tensor, mask: Tensor | None, keep: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Computes (Σ d², Σ projected teacher², d) for student (T, n), teacher (T, N) and mask (T,).

    d (T, p) is the difference of the projections, in fp32 or wider: zero in rows that do not count, empty without
    `keep`.
    """
    columns = student.shape[1]
    of_student = student @ projection[:, :columns].to(student.dtype).t()  # (T, p)
    of_teacher = teacher @ projection.to(teacher.dtype).t()
    of_student, of_teacher = _widened(of_student, of_teacher)
    difference = of_student.sub_(of_teacher)
    if mask is not None:  # filled, not multiplied by 0: rows that do not count may hold no numbers
        left_out = ~mask.unsqueeze(1)
        difference = difference.masked_fill_(left_out, 0)
        of_teacher = of_teacher.masked_fill_(left_out, 0)
    sums = difference.pow(2).sum(), of_teacher.pow(2).sum()
    if not keep:
        difference = difference.new_empty(0)
    return *sums, difference


@implements("reference", "feature_spread")
def _feature_spread(difference: Tensor, projection: Tensor, scale: Tensor, columns: int, dtype: torch.dtype) -> Tensor:
    """Computes scale · d · P[:, :n] as (T, n) of `dtype`; scale is one number on the device."""
    return (difference @ projection[:, :columns].to(difference.dtype)).mul_(scale).to(dtype)


@implements("reference", "feature_projected_gradient")
def _feature_projected_gradient(difference: Tensor, x: Tensor) -> Tensor:
    """Computes dᵀ · x, (p, n)."""
    return difference.t() @ x.to(difference.dtype)


# ---- the operator ----------------------------------------------------------------------------------------------------


@torch.library.custom_op("mlfs::feature_distance", mutates_args=())
def _feature_distance(
    student: Tensor, teacher: Tensor, projection: Tensor, mask: Tensor | None, keep: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(value, d, scale): d (T, p) is the difference of the projections, empty without `keep`; d value = scale · d."""
    counts = None if mask is None else mask.reshape(-1)  # (T,)
    rows = flat_rows(student), flat_rows(teacher)
    above, below, difference = run("feature_difference", (student,), *rows, projection, counts, keep)
    value = above / below.clamp_min(torch.finfo(below.dtype).tiny)
    scale = torch.where(below > 0, 2 / below, 0)  # no gradient from a teacher that is zero everywhere
    return value, difference, scale


@_feature_distance.register_fake
def _(student, teacher, projection, mask, keep):
    dtype = _wide(student, teacher)
    difference = student.new_empty(0, dtype=dtype)
    if keep:
        difference = student.new_empty((tokens_of(student), projection.shape[0]), dtype=dtype)
    return student.new_empty((), dtype=dtype), difference, student.new_empty((), dtype=dtype)


@torch.library.custom_op("mlfs::feature_distance_backward", mutates_args=())
def _feature_distance_backward(
    scale: Tensor,
    difference: Tensor,
    projection: Tensor,
    student: Tensor | None,
    teacher: Tensor | None,
    columns: int,
    dtype: torch.dtype,
    needs_dx: bool,
) -> tuple[Tensor, Tensor]:
    """(dx (T, n) of `dtype`, empty unless needed; d_projection (p, N), empty unless student and teacher are given)."""
    on = (difference,)
    dx, d_projection = difference.new_empty(0, dtype=dtype), torch.empty_like(projection[:0])
    if needs_dx:
        dx = run("feature_spread", on, difference, projection, scale, columns, dtype)
    if student is not None and teacher is not None:
        sums = run("feature_projected_gradient", on, difference, flat_rows(teacher))  # (p, N)
        more = run("feature_projected_gradient", on, difference, flat_rows(student))  # (p, n)
        # d = student · P[:, :n]ᵀ − teacher · Pᵀ, so dP = dᵀ · student on n columns, minus dᵀ · teacher on all.
        sums.neg_()[:, :columns] += more
        d_projection = sums.mul_(scale).to(projection.dtype)
    return dx, d_projection


@_feature_distance_backward.register_fake
def _(scale, difference, projection, student, teacher, columns, dtype, needs_dx):
    dx = difference.new_empty((difference.shape[0], columns) if needs_dx else 0, dtype=dtype)
    return dx, torch.empty_like(projection[:0] if student is None else projection)


def _keep(ctx: Any, inputs: Sequence[Any], output: Sequence[Tensor]) -> None:
    student, teacher, projection, _, _ = inputs
    _, difference, scale = output
    ctx.set_materialize_grads(False)
    ctx.shape, ctx.dtype = student.shape, student.dtype
    rows = (student, teacher) if projection.requires_grad else (None, None)  # only the projection's gradient reads them
    ctx.save_for_backward(difference, scale, projection, *rows)


def _gradients(ctx: Any, of_outputs: Sequence[Tensor | None], of_input: None) -> tuple[Any, ...]:
    difference, scale, projection, student, teacher = ctx.saved_tensors
    needs_dx, _, learns = ctx.needs_input_grad[:3]
    d_value = of_outputs[0]
    if d_value is None or not (needs_dx or learns):
        return None, None, None, None, None
    options = ctx.shape[-1], ctx.dtype, needs_dx
    dx, d_projection = _feature_distance_backward(d_value * scale, difference, projection, student, teacher, *options)
    if needs_dx:
        dx = dx.view(ctx.shape)
    return wanted_if(needs_dx, dx), None, wanted_if(learns, d_projection), None, None


differentiable(_feature_distance, _keep, _gradients, results=lambda inputs: 1)


def _wide(first: Tensor, second: Tensor) -> torch.dtype:
    return torch.promote_types(torch.promote_types(first.dtype, second.dtype), torch.float32)


def _widened(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Both in the wider of their types, and in fp32 at least."""
    dtype = _wide(first, second)
    return first.to(dtype), second.to(dtype)


def _weights(rows: Tensor, mask: Tensor | None) -> Tensor:
    """1 for each row (...,) that counts, 0 for the others."""
    if mask is None:
        return torch.ones(rows.shape[:-1], dtype=rows.dtype, device=rows.device)
    return mask.to(rows.dtype)
