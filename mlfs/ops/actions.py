"""Whole actions of layers: each takes the fastest way for its tensors, and falls back by itself.

An action computes what the references of `mlfs.ops.sliced_linear`, `joint_linear` and `feed_forward` compute. There are
three ways: directly, by one call of an implementation, where no operator of PyTorch's is needed (see
`mlfs.ops.backend.direct_implementation`); fused, by the operator of several layers; and layer by layer.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from mlfs.ops.backend import backend_of, direct_implementation, has_implementation, runs_as_operators
from mlfs.ops.feed_forward import feed_forward, may_feed_forward
from mlfs.ops.joint_linear import joint_linear, may_join
from mlfs.ops.layer import NOTHING, Epilogue, LowRankLinear
from mlfs.ops.sliced_linear import check_epilogue, sliced_linear, sliced_linear_reference

__all__ = ["feed_forward_block", "fuses_activations", "linear", "linears", "trains_fused"]


def linear(x: Tensor, layer: LowRankLinear, epilogue: Epilogue = NOTHING, trains_base: bool = False) -> Tensor:
    """Applies one layer and what follows it: act(z) [· operand] + residual.

    Args:
        x: (..., n), floating point; under autocast cast to its type.
        trains_base: whether the layer's own weight and bias want gradients; by default they are frozen.

    Returns:
        (..., m) of x's type; with a residual, of the wider of theirs.

    Raises:
        MLFSError: an unknown activation, or an operand where none belongs or none where one does.
    """
    direct = direct_implementation("direct_linears", x, layer.weight, epilogue.operand, epilogue.residual)
    if direct is not None:
        # The extension checks shapes and types; activations go there as numbers.
        if epilogue is not NOTHING:
            check_epilogue(epilogue)
        return direct(x, (layer,), epilogue)[0]
    if trains_base:
        return sliced_linear_reference(x, layer, epilogue)
    return sliced_linear(x, layer, epilogue)


def linears(
    x: Tensor, layers: Sequence[LowRankLinear], gated: bool = False, returns_input: bool = False
) -> list[Tensor]:
    """Applies every layer to x. With `gated`, computes SiLU(first(x)) · second(x) instead.

    Args:
        x: (..., n), floating point; under autocast cast to its type.
        layers: any number; if gated, two of as many rows. Their weights are frozen.
        returns_input: also return x: the gradient of x's other readers is then added by the kernel that makes dx. Not
            with `gated`.

    Returns:
        [(..., m_i) of each layer], or, gated, [(..., m)]; and x, if it `returns_input`.
    """
    # Without gradients the operator of several layers has nothing to add: the direct call takes them all, too.
    direct = direct_implementation("direct_linears", x, *[layer.weight for layer in layers])
    if direct is None and has_implementation("joint_backward", x) and may_join(layers):
        return joint_linear(x, layers, gated, returns_input)
    if gated:  # SiLU and the product with the other are computed while the gate's product is in registers
        gate, up = layers
        ys = [linear(x, gate, Epilogue("silu_mul", operand=linear(x, up)))]
    elif direct is not None:
        ys = direct(x, layers)
    else:
        ys = [sliced_linear(x, layer) for layer in layers]
    if returns_input:
        ys.append(x)
    return ys


def feed_forward_block(
    x: Tensor,
    layers: Sequence[LowRankLinear],
    activation: str,
    residual: Tensor | None = None,
    returns_input: bool = False,
) -> list[Tensor]:
    """Applies a feed-forward block: down(act(up(x))) + residual, or down(SiLU(gate(x)) · up(x)) + residual.

    Args:
        x: (..., n), floating point; under autocast cast to its type.
        layers: [up, down], or [gate, up, down] for the activation "silu_mul". Their weights are frozen.
        residual: (..., m), or None.
        returns_input: also return x, as `linears` does.

    Returns:
        [(..., m)], or, if it `returns_input`, [(..., m), x].
    """
    if trains_fused(x) and may_feed_forward(layers, activation):
        return feed_forward(x, layers, activation, residual, returns_input)
    *ups, down = layers
    if len(ups) > 1:
        (activated,) = linears(x, ups, gated=True)
    else:
        activated = linear(x, ups[0], Epilogue(activation))
    y = linear(activated, down, Epilogue(residual=residual))
    return [y, x] if returns_input else [y]


def trains_fused(x: Tensor) -> bool:
    """Tells whether blocks of layers are worth an operator of their own, for tensors such as x.

    They are where a gradient is wanted, and the product that makes it goes back through the activation and adds up the
    gradients of all that reads its input: else nothing is saved.
    """
    return torch.is_grad_enabled() and has_implementation("linear_backward_through_activation", x)


def fuses_activations(x: Tensor) -> bool:
    """Tells whether an activation is computed inside the product before it; else it is a pass of its own."""
    return runs_as_operators() and backend_of(x) != "reference"
