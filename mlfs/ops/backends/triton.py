"""The backend for GPUs: the kernels of `mlfs.kernels`. Nothing of Triton is imported before one of them is wanted.

Each function below is what the operator that its decorator names is here; what it takes and gives is said in the
operator's own file, beside the reference.
"""

import os
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from mlfs.ops.backends.table import Backend, Others, implements
from mlfs.ops.layer import Activated, Dropout, Epilogue, LowRankLinear, Norm, Wanted

TYPES = (torch.float32, torch.bfloat16, torch.float16)


@cache
def _why_not_here() -> str | None:
    try:
        import triton  # noqa: F401
    except ImportError:
        return "triton is not installed (it comes with PyTorch's builds for GPUs)"
    if not torch.cuda.is_available() and not _interpreted():
        return "PyTorch sees no GPU (TRITON_INTERPRET=1 runs the kernels, slowly, on a CPU)"
    return None


def _takes(x: Tensor, others: Others) -> bool:
    return x.is_cuda and x.dtype in TYPES and _why_not_here() is None


def _why_not(x: Tensor, others: Others) -> str | None:
    if x.dtype not in TYPES:
        return f"{x.dtype} is not supported, expected one of {TYPES}"
    if not x.is_cuda and not _interpreted():
        return f"a tensor on {x.device}; move it to a GPU, or start Python with TRITON_INTERPRET=1"
    return None


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


BACKEND = Backend("triton", _why_not_here, _takes, _why_not)


@implements("triton", "linear_forward")
def linear_forward(x: Tensor, layer: LowRankLinear, epilogue: Epilogue, keep: bool) -> tuple[Tensor, Tensor, Tensor]:
    from mlfs.kernels import decode, product

    # Outputs of an operator share no memory, so each empty one is a tensor of its own.
    if not keep and x.shape[0] <= decode.MAX_TOKENS:
        return decode.forward(x, layer, epilogue), x.new_empty(0), x.new_empty(0)
    keep_pre = keep and epilogue.activation != "none"
    y, h, pre = product.forward(x, layer, epilogue, keep_pre=keep_pre)
    if not keep:
        h = x.new_empty(0)
    return y, h, pre


@implements("triton", "activation_backward")
def activation_backward(
    dy: Tensor, pre: Tensor, operand: Tensor | None, activation: str
) -> tuple[Tensor, Tensor | None]:
    from mlfs.kernels import product

    return product.activation_backward(dy, pre, operand, activation)


@implements("triton", "linear_backward")
def linear_backward(
    dy: Tensor, x: Tensor | None, h: Tensor | None, layer: LowRankLinear, wanted: Wanted, residual: Tensor | None = None
) -> tuple[Tensor, list[Tensor]]:
    from mlfs.kernels import product

    return product.backward(dy, x, h, layer, wanted, residual)


@implements("triton", "linear_backward_through_activation")
def linear_backward_through_activation(
    dy: Tensor, x: Tensor | None, h: Tensor | None, layer: LowRankLinear, wanted: Wanted, activated: Activated
) -> tuple[Tensor, Tensor | None, list[Tensor]]:
    from mlfs.kernels import product

    if x is None:  # it is made again, beside the gradient of what it was made from
        wanted = replace(wanted, dx=True)
    return product.backward_through_activation(dy, x, h, layer, wanted, activated)


@implements("triton", "makes_activated_again")
def makes_activated_again(x: Tensor) -> bool:
    return x.dtype.itemsize == 2  # wider numbers spill


@implements("triton", "joint_forward")
def joint_forward(x: Tensor, layers: Sequence[LowRankLinear], gated: bool, keep: bool) -> Any:
    from mlfs.kernels import decode, joint

    if not keep and x.shape[0] <= decode.MAX_TOKENS:
        return NotImplemented  # a few tokens, as in decoding, have kernels of their own, layer by layer
    return joint.forward(x, layers, gated, keep)


@implements("triton", "joint_backward")
def joint_backward(
    dys: Sequence[Tensor],
    x: Tensor | None,
    h: Tensor | None,
    layers: Sequence[LowRankLinear],
    wanted: Wanted,
    residual: Tensor | None = None,
) -> tuple[Tensor, list[Tensor]]:
    from mlfs.kernels import joint

    return joint.backward(dys, x, h, layers, wanted, residual)


@implements("triton", "grouped_forward")
def grouped_forward(x: Tensor, layer: LowRankLinear, groups: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
    from mlfs.kernels import grouped

    return grouped.forward(x, layer, groups)


@implements("triton", "grouped_backward")
def grouped_backward(
    dy: Tensor, x: Tensor | None, h: Tensor | None, layer: LowRankLinear, groups: tuple[Any, ...], wanted: Wanted
) -> tuple[Tensor, list[Tensor]]:
    from mlfs.kernels import grouped

    return grouped.backward(dy, x, h, layer, groups, wanted)


@implements("triton", "add_norm")
def add_norm(
    x: Tensor, residual: Tensor | None, norm: Norm, dropout: Dropout, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    from mlfs.kernels import norm as kernels

    return kernels.forward(x, residual, norm, dropout, dtype)


@implements("triton", "add_norm_backward")
def add_norm_backward(
    dy: Tensor, ds: Tensor | None, s: Tensor, norm: Norm, dropout: Dropout, trains: bool
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    from mlfs.kernels import norm as kernels

    dx, d_residual, d_weight, d_bias = kernels.backward(dy, ds, s, norm, dropout, trains)
    if not dropout.p:
        return dx, None, d_weight, d_bias  # d_residual is dx
    return dx, d_residual, d_weight, d_bias


@implements("triton", "rotary")
def rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, dtype: torch.dtype, backward: bool) -> tuple[Tensor, Tensor]:
    from mlfs.kernels import rotary as kernels

    return kernels.rotary(q, k, cos, sin, dtype, backward)


@implements("triton", "feature_difference")
def feature_difference(
    student: Tensor, teacher: Tensor, projection: Tensor, mask: Tensor | None, keep: bool
) -> tuple[Tensor, Tensor, Tensor]:
    from mlfs.kernels import distill as kernels

    return kernels.difference(student, teacher, projection, mask, keep)


@implements("triton", "feature_spread")
def feature_spread(difference: Tensor, projection: Tensor, scale: Tensor, columns: int, dtype: torch.dtype) -> Tensor:
    from mlfs.kernels import distill as kernels

    return kernels.spread(difference, projection, scale, columns, dtype)


@implements("triton", "feature_projected_gradient")
def feature_projected_gradient(difference: Tensor, x: Tensor) -> Tensor:
    from mlfs.kernels import distill as kernels

    return kernels.projected_gradient(difference, x)


@implements("triton", "rows_that_count")
def rows_that_count(labels: Tensor) -> None:
    return None  # all: the kernel skips the others, and counting them would keep the host waiting for the device


@implements("triton", "head_rows")
def head_rows(
    logits: Tensor, teacher: Tensor | None, labels: Tensor, sums: Tensor, shares: tuple[float, float, float], keep: bool
) -> None:
    from mlfs.kernels import distill as kernels

    alpha, temperature, smoothing = shares
    kernels.head_rows(logits, teacher, labels, sums, alpha, temperature, smoothing, keep)
