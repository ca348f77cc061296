"""Several elastic linear layers in one call."""

from collections.abc import Sequence

from torch import Tensor

from mlfs.elastic.linear import ElasticLinear
from mlfs.ops.actions import feed_forward_block, linears
from mlfs.ops.layer import LowRankLinear


def project(x: Tensor, *layers: ElasticLinear, gated: bool = False, returns_input: bool = False) -> list[Tensor]:
    """Applies every layer to x. With `gated`, computes SiLU(first(x)) · second(x) instead.

    Where no layer must be called by itself, they go to `mlfs.ops.actions.linears` together.

    Args:
        x: (..., n).
        layers: any number; if gated, two of as many rows.
        returns_input: also return x: the gradient of x's other readers is then added by the kernel that makes dx.

    Returns:
        [(..., m_i) of each layer], or, gated, [(..., m)]; and x, if it `returns_input`.
    """
    values = _values(x, layers)
    if values is not None:
        return linears(x, values, gated, returns_input)
    if gated:
        gate, up = layers
        ys = [gate.followed_by(x, "silu_mul", operand=up(x))]
    else:
        ys = [layer(x) for layer in layers]
    if returns_input:
        ys.append(x)
    return ys


def feed_forward(
    x: Tensor,
    ups: Sequence[ElasticLinear],
    down: ElasticLinear,
    activation: str,
    residual: Tensor | None = None,
    returns_input: bool = False,
) -> list[Tensor]:
    """Applies a feed-forward block: down(act(up(x))) + residual, or down(SiLU(gate(x)) · up(x)) + residual.

    Where no layer must be called by itself, they go to `mlfs.ops.actions.feed_forward_block` together.

    Args:
        x: (..., n).
        ups: [up], or [gate, up] for the activation "silu_mul".
        residual: (..., m), or None.
        returns_input: also return x: the gradient of x's other readers is then added by the kernel that makes dx.

    Returns:
        [(..., m)], or, if it `returns_input`, [(..., m), x].
    """
    values = _values(x, [*ups, down])
    if values is not None and values[0].rows <= down.in_features:
        return feed_forward_block(x, values, activation, residual, returns_input)
    if len(ups) > 1:
        (activated,) = project(x, *ups, gated=True)
    else:
        activated = ups[0].followed_by(x, activation)
    y = down.followed_by(activated, residual=residual)
    return [y, x] if returns_input else [y]


def _values(x: Tensor, layers: Sequence[ElasticLinear]) -> list[LowRankLinear] | None:
    """All layers as operators take them; None where one must be called, or raises when it is called."""
    if x.shape[-1] > layers[0].in_features:
        return None
    values = []
    for layer in layers:
        value = layer.for_operators()
        if value is None:
            return None
        values.append(value)
    return values
