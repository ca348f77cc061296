"""A whole layer of an encoder in one call, without gradients:

    t = layer_norm(x + out(attention(query(x), key(x), value(x)))),   y = layer_norm(t + down(act(up(t))))

This is the layer of encoders like BERT (arXiv 1810.04805): between products of a few tokens, calls take longer than the
products do. There is no reference of its own: it is what `mlfs.ops.sliced_linear`, `attention` and `norm` compute one
after the other, and tests compare it with them.
"""

from typing import NamedTuple

from torch import Tensor

from mlfs.ops.backend import direct_implementation
from mlfs.ops.layer import LowRankLinear, Norm

__all__ = ["EncoderLayer", "encoder_layer"]


class EncoderLayer(NamedTuple):
    """An encoder's layer, as it is read now.

    Attributes:
        query, key, value, out, up, down: linear layers.
        norm, last_norm: layer normalisations.
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
    """Computes the formula above, y (rows, tokens, n) of x (rows, tokens, n), in one call.

    Args:
        ranges: which tokens attend to which keys, see `mlfs.ops.attention`.

    Returns:
        y; None where there is no such call: gradients are wanted, or the backend for these tensors has none.
    """
    linears = (layer.query, layer.key, layer.value, layer.out, layer.up, layer.down)
    direct = direct_implementation("direct_encoder_layer", x, *(linear.weight for linear in linears))
    return None if direct is None else direct(x, layer, ranges)
