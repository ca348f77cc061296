"""What a subnet learns from maxnet: a divergence of output distributions and a distance of hidden states.

    divergence       = T² · Σ_v p_v (log p_v − log q_v),   p = softmax(teacher / T), q = softmax(student / T)
    feature_distance = ‖h_student · P[:, :n]ᵀ − h_teacher · Pᵀ‖² / ‖h_teacher · Pᵀ‖²

averaged over the rows that `mask` keeps (Hinton et al., arXiv 1503.02531; arXiv 2404.01353, section 3). The second
is relative to the teacher's size, so that one weight β suits models whose hidden states differ by orders of magnitude.
"""

import torch
from torch import Tensor

from mlfs.errors import MLFSError
from mlfs.ops.backend import backend_of

__all__ = ["divergence", "feature_distance", "feature_distance_reference"]


def divergence(student: Tensor, teacher: Tensor, mask: Tensor | None = None, temperature: float = 1.0) -> Tensor:
    """Mean KL(teacher ‖ student) over rows, times T²: a float32 (or float64) scalar.

    Args:
        student, teacher: logits (..., V); the teacher's are constants.
        mask: (...,) bool, rows that count; None for all. No row at all gives 0.
    """
    student, teacher, weight = _rows(student, teacher.detach(), mask)
    log_p = torch.log_softmax(teacher / temperature, dim=-1)
    log_q = torch.log_softmax(student / temperature, dim=-1)
    rows = (log_p.exp() * (log_p - log_q)).sum(-1)
    return temperature**2 * (rows * weight).sum() / weight.sum().clamp_min(1)


def feature_distance_reference(
    student: Tensor, teacher: Tensor, projection: Tensor, mask: Tensor | None = None
) -> Tensor:
    """The formula in plain, differentiable PyTorch."""
    n = student.shape[-1]
    teacher = teacher.detach()
    goal = teacher @ projection.to(teacher.dtype).t()
    mine = student @ projection[:, :n].to(student.dtype).t()
    mine, goal, weight = _rows(mine, goal, mask)
    distance = ((mine - goal).pow(2).sum(-1) * weight).sum()
    return distance / (goal.detach().pow(2).sum(-1) * weight).sum().clamp_min(torch.finfo(goal.dtype).tiny)


def feature_distance(student: Tensor, teacher: Tensor, projection: Tensor, mask: Tensor | None = None) -> Tensor:
    """Relative squared distance of projected hidden states: a float32 (or float64) scalar.

    Has gradients in student and, if it trains, projection; the divisor counts as constant.

    Args:
        student: (..., n). teacher: (..., N), n ≤ N, constant.
        projection: (p, N); the student is read by its leading n columns.
        mask: (...,) bool, rows (tokens) that count; None for all.

    Raises:
        MLFSError: shapes that do not fit together.
    """
    rows, full = student.shape[:-1], projection.shape[1]
    if teacher.shape != (*rows, full) or student.shape[-1] > full or (mask is not None and mask.shape != rows):
        shapes = ", ".join(str(tuple(t.shape)) for t in (student, teacher, projection, mask) if t is not None)
        raise MLFSError(
            f"student, teacher, projection and mask of {shapes}: expected (..., n), (..., N), (p, N), (...)"
        )
    keep = torch.is_grad_enabled() and (student.requires_grad or projection.requires_grad)
    mask = None if mask is None else mask.bool()
    return _feature_distance(student, teacher.detach(), projection, mask, keep)[0]


@torch.library.custom_op("mlfs::feature_distance", mutates_args=())
def _feature_distance(
    student: Tensor, teacher: Tensor, projection: Tensor, mask: Tensor | None, keep: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(value, d, scale): d (T, p) is the difference of the projections, empty without `keep`; d value = scale · d."""
    n, full = student.shape[-1], projection.shape[1]
    mine, goal, counts = student.reshape(-1, n), teacher.reshape(-1, full), None if mask is None else mask.reshape(-1)
    if backend_of(student) == "triton":
        from mlfs.kernels import distill

        above, below, d = distill.difference(mine, goal, projection, counts, keep)
    else:
        mine, goal, _ = _rows(mine @ projection[:, :n].to(mine.dtype).t(), goal @ projection.to(goal.dtype).t(), counts)
        d = mine.sub_(goal)
        if counts is not None:
            d, goal = (t.masked_fill_(~counts.unsqueeze(1), 0) for t in (d, goal))
        above, below, d = d.pow(2).sum(), goal.pow(2).sum(), d if keep else d.new_empty(0)
    value = above / below.clamp_min(torch.finfo(below.dtype).tiny)
    return value, d, torch.where(below > 0, 2 / below, 0)


@_feature_distance.register_fake
def _(student, teacher, projection, mask, keep):
    kind = _wide(student, teacher)
    d = student.new_empty((student.shape[:-1].numel(), projection.shape[0]) if keep else 0, dtype=kind)
    return student.new_empty((), dtype=kind), d, student.new_empty((), dtype=kind)


@torch.library.custom_op("mlfs::feature_distance_backward", mutates_args=())
def _feature_distance_backward(
    scale: Tensor,
    d: Tensor,
    projection: Tensor,
    student: Tensor | None,
    teacher: Tensor | None,
    n: int,
    dtype: torch.dtype,
    needs_dx: bool,
) -> tuple[Tensor, Tensor]:
    """(dx (T, n) of `dtype`, empty unless needed; d_projection (p, N), empty unless student and teacher are given)."""
    dx, gradient = d.new_empty(0, dtype=dtype), torch.empty_like(projection[:0])
    triton = backend_of(d) == "triton"
    if triton:
        from mlfs.kernels import distill as kernels
    if needs_dx:
        if triton:
            dx = kernels.spread(d, projection, scale, n, dtype)
        else:
            dx = (d @ projection[:, :n].to(d.dtype)).mul_(scale).to(dtype)
    if student is not None and teacher is not None:
        mine, goal = student.reshape(-1, n), teacher.reshape(-1, projection.shape[1])
        if triton:
            sums, more = kernels.projected_gradient(d, goal), kernels.projected_gradient(d, mine)
        else:
            sums, more = d.t() @ goal.to(d.dtype), d.t() @ mine.to(d.dtype)
        sums.neg_()[:, :n] += more
        gradient = sums.mul_(scale).to(projection.dtype)
    return dx, gradient


@_feature_distance_backward.register_fake
def _(scale, d, projection, student, teacher, n, dtype, needs_dx):
    dx = d.new_empty((d.shape[0], n) if needs_dx else 0, dtype=dtype)
    return dx, torch.empty_like(projection[:0] if student is None else projection)


def _setup_context(ctx, inputs, output) -> None:
    student, teacher, projection, _, _ = inputs
    _, d, scale = output
    ctx.mark_non_differentiable(d, scale)
    ctx.set_materialize_grads(False)
    ctx.shape, ctx.dtype = student.shape, student.dtype
    learns = projection.requires_grad
    ctx.save_for_backward(d, scale, projection, *((student, teacher) if learns else (None, None)))


def _backward(ctx, d_value, d_d, d_scale):
    d, scale, projection, student, teacher = ctx.saved_tensors
    needs_dx, _, learns = ctx.needs_input_grad[:3]
    if d_value is None or not (needs_dx or learns):
        return None, None, None, None, None
    options = ctx.shape[-1], ctx.dtype, needs_dx
    dx, gradient = _feature_distance_backward(d_value * scale, d, projection, student, teacher, *options)
    return dx.view(ctx.shape) if needs_dx else None, None, gradient if learns else None, None, None


_feature_distance.register_autograd(_backward, setup_context=_setup_context)


def _wide(a: Tensor, b: Tensor) -> torch.dtype:
    return torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32)


def _rows(a: Tensor, b: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    wide = _wide(a, b)
    a, b = a.to(wide), b.to(wide)
    weight = torch.ones(a.shape[:-1], dtype=wide, device=a.device) if mask is None else mask.to(wide)
    return a, b, weight
