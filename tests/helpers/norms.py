"""`mlfs.ops.norm` with the parts of a norm by their names, as test cases draw them."""

import torch
from torch import Tensor

from mlfs.ops import norm
from mlfs.ops.layer import Norm


def add_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float, rms: bool,
    p: float = 0.0, seed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return norm.add_norm(x, residual, Norm(weight, bias, eps, rms), p, seed)


def add_norm_reference(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float, rms: bool,
    statistics: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return norm.add_norm_reference(x, residual, Norm(weight, bias, eps, rms), statistics)
