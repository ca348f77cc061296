"""Normalisation over the leading n numbers of the residual stream.

    layer_norm: y = (x − mean(x)) / sqrt(var(x) + eps) · w[:n] + b[:n]        (Ba et al., arXiv 1607.06450)
    rms_norm:   y = w[:n] · cast(x / sqrt(mean(x²) + eps))                    (Zhang and Sennrich, arXiv 1910.07467)

Shapes: x (..., n), w and b (N,), n ≤ N; y (..., n). The statistics are those of the n numbers that are there.
"""

import torch
from torch import Tensor


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """Layer normalisation of x (..., n) with the leading n of weight and bias (N,)."""
    n = x.shape[-1]
    w = None if weight is None else weight[:n]
    b = None if bias is None else bias[:n]
    return torch.nn.functional.layer_norm(x, (n,), w, b, eps)


def rms_norm(x: Tensor, weight: Tensor, eps: float, statistics: torch.dtype | None = None) -> Tensor:
    """Root-mean-square normalisation of x (..., n) with the leading n of weight (N,).

    The scaled x is cast back before it meets the weight, as the Llama family does.

    Args:
        statistics: the type they are taken in; by default float32, or float64 for float64 x. (The Llama family takes
            float32 always.)
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32) if statistics is None else statistics)
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight[: x.shape[-1]] * wide.to(x.dtype)
