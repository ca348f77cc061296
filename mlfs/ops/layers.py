"""What whole layers ask of the device, and a whole layer in one call, without gradients.

    t = layer_norm(x + out(attention(query(x), key(x), value(x)))),   y = layer_norm(t + down(act(up(t))))

This is the layer of encoders like BERT (arXiv 1810.04805): between products of a few tokens, calls take longer than the
products do. There is no reference of its own: it is what `mlfs.ops.sliced_linear`, `attention` and `norm` compute one
after the other, and tests compare it with them.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from mlfs.ops.backend import backend_of, cpp, is_direct
from mlfs.ops.layer import ACTIVATIONS, LowRankLinear

__all__ = ["EncoderLayer", "encoder_layer", "fuses_activations", "trains_on_kernels"]

Norm = tuple[Tensor | None, Tensor | None, float]  # weight, bias, eps


class EncoderLayer(NamedTuple):
    """An encoder's layer, as it is read now.

    Attributes:
        query, key, value, out, up, down: linear layers.
        norm, last_norm: (weight, bias, eps).
        activation: one of `mlfs.ops.layer.ACTIVATIONS` that takes no operand.
        head_dim: numbers per head. scale: of the products of queries and keys.
    """

    query: LowRankLinear
    key: LowRankLinear
    value: LowRankLinear
    out: LowRankLinear
    norm: Norm
    up: LowRankLinear
    activation: str
    down: LowRankLinear
    last_norm: Norm
    head_dim: int
    scale: float


def encoder_layer(x: Tensor, layer: EncoderLayer, ranges: Tensor) -> Tensor | None:
    """Computes the formula above, y (rows, tokens, n) of x (rows, tokens, n), in one call of the extension for CPUs.

    Args:
        ranges: which tokens attend to which keys, see `mlfs.ops.attention`.

    Returns:
        y; None where there is no such call: gradients are wanted, or the extension does not take these tensors.
    """
    linears = (layer.query, layer.key, layer.value, layer.out, layer.up, layer.down)
    if not is_direct(x, *(linear[0] for linear in linears)):
        return None
    projections = [layer.query, layer.key, layer.value]
    activation = ACTIVATIONS.index(layer.activation)
    return cpp().encoder_layer(
        x, projections, layer.out, layer.norm, layer.up, activation, layer.down, layer.last_norm, ranges,
        layer.head_dim, layer.scale,
    )  # fmt: skip


def fuses_activations(x: Tensor) -> bool:
    """Tells whether an activation is computed inside the product before it; else it is a pass of its own."""
    return backend_of(x) != "reference"


def trains_on_kernels(x: Tensor) -> bool:
    """Tells whether gradients are wanted and the operators run on Triton's kernels, whose backward passes add up the
    gradients of all that reads their input."""
    return torch.is_grad_enabled() and backend_of(x) == "triton"
