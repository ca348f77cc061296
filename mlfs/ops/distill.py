"""What a subnet learns from maxnet: a divergence of output distributions and a distance of hidden states.

    divergence       = T² · Σ_v p_v (log p_v − log q_v),   p = softmax(teacher / T), q = softmax(student / T)
    feature_distance = ‖h_student · P[:, :n]ᵀ − h_teacher · Pᵀ‖² / ‖h_teacher · Pᵀ‖²

averaged over the rows that `mask` keeps (Hinton et al., arXiv 1503.02531; arXiv 2404.01353, section 3). The second
is relative to the teacher's size, so that one weight β suits models whose hidden states differ by orders of magnitude.
"""

import torch
from torch import Tensor


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


def feature_distance(student: Tensor, teacher: Tensor, projection: Tensor, mask: Tensor | None = None) -> Tensor:
    """Relative squared distance of projected hidden states: a float32 (or float64) scalar.

    Args:
        student: (..., n). teacher: (..., N), n ≤ N, constant.
        projection: (p, N); the student is read by its leading n columns.
        mask: (...,) bool, rows (tokens) that count; None for all.
    """
    n = student.shape[-1]
    teacher = teacher.detach()
    goal = teacher @ projection.to(teacher.dtype).t()
    mine = student @ projection[:, :n].to(student.dtype).t()
    mine, goal, weight = _rows(mine, goal, mask)
    distance = ((mine - goal).pow(2).sum(-1) * weight).sum()
    return distance / (goal.detach().pow(2).sum(-1) * weight).sum().clamp_min(torch.finfo(goal.dtype).tiny)


def _rows(a: Tensor, b: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    wide = torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32)
    a, b = a.to(wide), b.to(wide)
    weight = torch.ones(a.shape[:-1], dtype=wide, device=a.device) if mask is None else mask.to(wide)
    return a, b, weight
