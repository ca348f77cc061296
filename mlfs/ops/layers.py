"""Whole layers in one call, without gradients: between products of a few tokens, calls take longer than they do.

    t = layer_norm(x + out(attention(query(x), key(x), value(x)))),   y = layer_norm(t + down(act(up(t))))

This is the layer of encoders like BERT (arXiv 1810.04805). There is no reference of its own: it is what
`mlfs.ops.sliced_linear`, `attention` and `norm` compute one after the other, and tests compare it with them.
"""

from torch import Tensor

from mlfs.ops.backend import cpp
from mlfs.ops.layer import ACTIVATIONS, LowRankLinear

__all__ = ["encoder_layer"]

Norm = tuple[Tensor | None, Tensor | None, float]  # weight, bias, eps


def encoder_layer(
    x: Tensor,
    projections: list[LowRankLinear],
    out: LowRankLinear,
    norm: Norm,
    up: LowRankLinear,
    activation: str,
    down: LowRankLinear,
    last_norm: Norm,
    ranges: Tensor,
    head_dim: int,
    scale: float,
) -> Tensor:
    """y (rows, tokens, n) of x (rows, tokens, n), where `mlfs.ops.backend.is_direct`.

    Args:
        projections: of query, key and value; these and `out`, `up`, `down` are (weight, bias, lora_a, lora_b, scales,
            spans) as `mlfs.ops.sliced_linear` takes them.
        ranges: which tokens attend to which keys, see `mlfs.ops.attention`.
        scale: of the products of queries and keys.
    """
    act = ACTIVATIONS.index(activation)
    return cpp().encoder_layer(x, projections, out, norm, up, act, down, last_norm, ranges, head_dim, scale)
