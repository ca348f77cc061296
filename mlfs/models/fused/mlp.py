"""Fused feed-forward blocks."""

from typing import Any

from torch import Tensor, nn

from mlfs.elastic.joint import feed_forward
from mlfs.models.families.spec import MLP, Activated, GatedMLP
from mlfs.models.follow import Forward
from mlfs.models.fused.registry import GATED, GELUS, Activation, registers
from mlfs.ops.actions import fuses_activations
from mlfs.ops.observers import have_hooks


@registers(Activated, linears=("linear",), activations=GELUS)
def activated(block: Activated, own_forward: Forward, activation: Activation) -> Forward:
    """Builds activation(linear(x)): the activation is computed while the product is in registers."""

    def forward(self: Any, hidden_states: Tensor) -> Tensor:
        if have_hooks(getattr(self, block.activation)):
            return own_forward(self, hidden_states)
        return getattr(self, block.linear).followed_by(hidden_states, activation.name)

    return _where_fused(forward, own_forward) if activation.written_out else forward


@registers(MLP, linears=("up", "down"), others=("dropout",), activations=GELUS)
def mlp(block: MLP, own_forward: Forward, activation: Activation) -> Forward:
    """Builds dropout(down(activation(up(x)))), plus `residual` where the layer hands one in."""

    def forward(self: Any, hidden_states: Tensor, residual: Tensor | None = None) -> Tensor:
        up, down = getattr(self, block.up), getattr(self, block.down)
        dropout = getattr(self, block.dropout) if block.dropout else None
        if have_hooks(getattr(self, block.activation), *filter(None, [dropout])):
            y = own_forward(self, hidden_states)
            return y if residual is None else residual + y
        if dropout is None or (residual is not None and not drops(dropout)):
            # nothing comes between product and sum: the residual is added while the product is in registers
            return feed_forward(hidden_states, [up], down, activation.name, residual)[0]
        (y,) = feed_forward(hidden_states, [up], down, activation.name)
        y = dropout(y)
        return y if residual is None else residual + y

    return _where_fused(forward, own_forward) if activation.written_out else forward


@registers(GatedMLP, linears=("gate", "up", "down"), activations=GATED)
def gated_mlp(block: GatedMLP, own_forward: Forward, activation: Activation) -> Forward:
    """Builds down(activation(gate(x)) * up(x)), plus `residual` where the layer hands one in."""

    def forward(self: Any, x: Tensor, residual: Tensor | None = None) -> Tensor:
        if have_hooks(getattr(self, block.activation)):
            y = own_forward(self, x)
            return y if residual is None else residual + y
        gate_and_up = [getattr(self, block.gate), getattr(self, block.up)]
        return feed_forward(x, gate_and_up, getattr(self, block.down), activation.name, residual)[0]

    return forward


def drops(dropout: nn.Dropout) -> bool:
    """Tells whether the dropout is active."""
    return dropout.training and dropout.p > 0


def _where_fused(fused: Forward, own_forward: Forward) -> Forward:
    """Builds a forward pass that is `fused` where activations run inside products, and the module's own elsewhere.

    For activations that transformers writes out: another way of computing them rounds otherwise, and without kernels
    gains nothing.
    """

    def forward(self: Any, hidden_states: Tensor, **more: Any) -> Tensor:
        if fuses_activations(hidden_states):
            return fused(self, hidden_states, **more)
        y, residual = own_forward(self, hidden_states), more.get("residual")
        return y if residual is None else residual + y

    return forward
