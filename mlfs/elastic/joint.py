"""Several elastic linear layers in one call."""

from collections.abc import Sequence

import torch
from torch import Tensor

from mlfs.elastic.linear import ElasticLinear
from mlfs.ops.backend import backend_of, is_direct
from mlfs.ops.feed_forward import feed_forward as feed_forward_operator
from mlfs.ops.feed_forward import may_feed_forward
from mlfs.ops.joint_linear import Projection, joint_linear, may_join
from mlfs.ops.sliced_linear import direct_linears


def project(x: Tensor, *layers: ElasticLinear, gated: bool = False, returns_input: bool = False) -> list[Tensor]:
    """What each layer makes of the same x; gated: of two layers, SiLU(the first's) · the second's, alone; and x, if it
    `returns_input`, for what else reads it. On kernels in one call."""
    more = [x] if returns_input else []
    if backend_of(x) != "reference" and (parts := _projections(x, layers)):
        direct = is_direct(x, *(part.weight for part in parts))
        if direct and not gated:
            return direct_linears(x, [(*part[:5], [0, part.rows]) for part in parts]) + more
        if not direct and may_join(parts):
            return joint_linear(x, parts, gated, returns_input)
    if not gated:
        return [layer(x) for layer in layers] + more
    gate, up = layers
    return [gate(x, activation="silu_mul", operand=up(x)), *more]


def feed_forward(
    x: Tensor,
    ups: Sequence[ElasticLinear],
    down: ElasticLinear,
    activation: str,
    residual: Tensor | None = None,
    returns_input: bool = False,
) -> list[Tensor]:
    """[down(act(up(x))) + residual], for two `ups` (gate and up) [down(SiLU(gate(x)) · up(x)) + residual]; and x, if it
    `returns_input`, for what else reads it. In training on kernels in one call."""
    if torch.is_grad_enabled() and backend_of(x) == "triton":
        parts = _projections(x, [*ups, down])
        if parts and may_feed_forward(parts, activation):
            return feed_forward_operator(x, parts, activation, residual, returns_input)
    (y,) = project(x, *ups, gated=True) if len(ups) > 1 else [ups[0](x, activation=activation)]
    return [down(y, residual=residual), *([x] if returns_input else [])]


def _projections(x: Tensor, layers: Sequence[ElasticLinear]) -> list[Projection]:
    """All layers as operators of several take them; none where one has to be called."""
    found = [layer.projection() for layer in layers] if x.shape[-1] <= layers[0].in_features else []
    parts = [part for part in found if part is not None]
    return parts if len(parts) == len(layers) else []
