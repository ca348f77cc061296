"""The backend for CPUs: the extension compiled from csrc/.

Each function below is what the operator that its decorator names is here; what it takes and gives is said in the
operator's own file, beside the reference. `direct_...` are called without an operator of PyTorch's between.
"""

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from mlfs.ops.backends.built import warn_of_plain_pytorch
from mlfs.ops.backends.built import why_no_extension as why_no_cpp
from mlfs.ops.backends.table import Backend, Others, implements
from mlfs.ops.layer import ACTIVATIONS, NOTHING, Dropout, Epilogue, LowRankLinear, Norm, Wanted

TYPES = (torch.float32, torch.float64)
_WHY_NOT = why_no_cpp()  # asked once, here: torch.compile would trace the question, and break its graph at the file


@cache
def extension() -> Any:
    """Imports the compiled extension."""
    import mlfs._cpu as compiled

    return compiled


def _takes(x: Tensor, others: Others) -> bool:
    # fp64 is left to PyTorch: who computes in it compares, and wants its rounding
    if x.dtype != torch.float32 or not x.is_cpu or not _are_like(x, others):
        return False
    if _WHY_NOT is not None and not torch.compiler.is_compiling():
        warn_of_plain_pytorch(_WHY_NOT)
    return _WHY_NOT is None


def _why_not(x: Tensor, others: Others) -> str | None:
    if not x.is_cpu:
        return f"a tensor on {x.device}; move it to the CPU"
    if x.dtype not in TYPES or not _are_like(x, others):
        names = sorted({str(t.dtype).removeprefix("torch.") for t in (x, *others) if t is not None})
        return f"tensors of {', '.join(names)}; expected all float32, or all float64"
    return None


def _are_like(x: Tensor, others: Others) -> bool:
    """Says whether others are on the CPU, too, and of x's type.

    Each call of a layer asks: a loop takes half as long as all(), `is_cpu` a third of what comparing devices takes.
    """
    dtype = x.dtype
    for other in others:  # noqa: SIM110
        if other is not None and (other.dtype != dtype or not other.is_cpu):
            return False
    return True


BACKEND = Backend("cpp", lambda: why_no_cpp(), _takes, _why_not)


@implements("cpp", "direct_linears")
def direct_linears(x: Tensor, layers: Sequence[LowRankLinear], epilogue: Epilogue = NOTHING) -> list[Tensor]:
    activation, operand, residual = epilogue
    return extension().linear(x, layers, ACTIVATIONS.index(activation), operand, residual)


@implements("cpp", "linear_forward")
def linear_forward(x: Tensor, layer: LowRankLinear, epilogue: Epilogue, keep: bool) -> tuple[Tensor, Tensor, Tensor]:
    activation, operand, residual = epilogue
    ((y, h, pre),) = extension().linear_forward(x, [layer], ACTIVATIONS.index(activation), operand, residual, keep)
    if not keep:
        h = x.new_empty(0)
    if not keep or activation == "none":
        pre = x.new_empty(0)
    return y, h, pre


@implements("cpp", "activation_backward")
def activation_backward(
    dy: Tensor, pre: Tensor, operand: Tensor | None, activation: str
) -> tuple[Tensor, Tensor | None]:
    dz, d_operand = extension().activation_backward(dy, pre, operand, ACTIVATIONS.index(activation))
    if operand is None:
        d_operand = None
    return dz, d_operand


@implements("cpp", "linear_backward")
def linear_backward(
    dy: Tensor, x: Tensor | None, h: Tensor | None, layer: LowRankLinear, wanted: Wanted, residual: Tensor | None = None
) -> tuple[Tensor, list[Tensor]]:
    trains = [list(wanted.trains)]
    dx, (gradients,) = extension().linear_backward([dy], x, [h], [layer], trains, wanted.dx, wanted.columns)
    return _plus(dx, residual), gradients


@implements("cpp", "joint_backward")
def joint_backward(
    dys: Sequence[Tensor],
    x: Tensor | None,
    h: Tensor | None,
    layers: Sequence[LowRankLinear],
    wanted: Wanted,
    residual: Tensor | None = None,
) -> tuple[Tensor, list[Tensor]]:
    widths = [sum(layer.ranks) for layer in layers]
    h_of_each = [None] * len(layers) if h is None else list(h.split(widths, 1))
    # [of layer 0's stages, of layer 1's, ...]
    stages = len(wanted.trains) // len(layers)
    trains = [list(wanted.trains[i * stages : (i + 1) * stages]) for i in range(len(layers))]
    dx, gradients = extension().linear_backward(dys, x, h_of_each, layers, trains, wanted.dx, wanted.columns)
    return _plus(dx, residual), [gradient for own in gradients for gradient in own]


def _plus(dx: Tensor, residual: Tensor | None) -> Tensor:
    return dx if residual is None else dx.add_(residual)


@implements("cpp", "direct_encoder_layer")
def direct_encoder_layer(x: Tensor, layer: Any, ranges: Tensor) -> Tensor:
    norms = layer.norm[:3], layer.last_norm[:3]  # weight, bias and eps: both are layer normalisations
    projections, activation = [layer.query, layer.key, layer.value], ACTIVATIONS.index(layer.activation)
    y: Tensor = extension().encoder_layer(
        x, projections, layer.out, norms[0], layer.up, activation, layer.down, norms[1], ranges, layer.head_dim,
        layer.scale,
    )  # fmt: skip
    return y


@implements("cpp", "direct_add_norm")
def direct_add_norm(x: Tensor, residual: Tensor | None, norm: Norm) -> tuple[Tensor, Tensor]:
    return add_norm(x, residual, norm, Dropout(0.0, None), x.dtype)


@implements("cpp", "add_norm")
def add_norm(
    x: Tensor, residual: Tensor | None, norm: Norm, dropout: Dropout, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    weight, bias, eps, rms = norm.cut(x.shape[-1])
    return extension().add_norm(x, residual, weight, bias, eps, rms, dropout.p, dropout.number)


@implements("cpp", "add_norm_backward")
def add_norm_backward(
    dy: Tensor, ds: Tensor | None, s: Tensor, norm: Norm, dropout: Dropout, trains: bool
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    weight, _, eps, rms = norm.cut(s.shape[-1])
    options = eps, rms, dropout.p, dropout.number, trains
    dx, d_residual, d_weight, d_bias = extension().add_norm_backward(dy, ds, s, weight, *options)
    if not dropout.p:
        d_residual = None  # it is dx
    if not trains:
        d_weight, d_bias = None, None
    return dx, d_residual, d_weight, d_bias


@implements("cpp", "rotary")
def rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, dtype: torch.dtype, backward: bool) -> tuple[Tensor, Tensor]:
    return extension().rotary(q, k, cos, sin, backward)


@implements("cpp", "direct_rotary")
def direct_rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    return extension().rotary(q, k, cos, sin, False)


@implements("cpp", "head_rows")
def head_rows(
    logits: Tensor, teacher: Tensor | None, labels: Tensor, sums: Tensor, shares: tuple[float, float, float], keep: bool
) -> None:
    alpha, temperature, smoothing = shares
    extension().head_rows(logits, teacher, labels, sums, alpha, temperature, smoothing, keep)


@implements("cpp", "product")
def product(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> Tensor:
    return extension().product(x.to(out.dtype), weight, bias, out)
