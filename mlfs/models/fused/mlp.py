"""Feed-forward blocks that run fused."""

import functools
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from transformers.activations import ACT2FN

from mlfs.elastic.joint import feed_forward
from mlfs.models.families.spec import MLP, Activated, GatedMLP
from mlfs.ops.backend import backend_of

Forward = Callable[..., Any]
KNOWN_ACTIVATIONS = {
    type(ACT2FN[name]): activation
    for name, activation in (
        ("gelu", "gelu"),
        ("gelu_new", "gelu_tanh"),
        ("gelu_pytorch_tanh", "gelu_tanh"),
        ("silu", "silu_mul"),
    )
}


@functools.cache
def with_kernels(fused: Forward, original: Forward) -> Forward:
    def forward(self: Any, hidden_states: Tensor, **more: Any) -> Tensor:
        if backend_of(hidden_states) != "reference":
            return fused(self, hidden_states, **more)
        y, residual = original(self, hidden_states), more.get("residual")
        return y if residual is None else residual + y

    return forward


@functools.cache
def activated(spec: Activated, activation: str) -> Forward:
    def forward(self: Any, hidden_states: Tensor) -> Tensor:
        return getattr(self, spec.linear)(hidden_states, activation=activation)

    return forward


@functools.cache
def mlp(spec: MLP, activation: str) -> Forward:
    def forward(self: Any, hidden_states: Tensor, residual: Tensor | None = None) -> Tensor:
        up, down, dropout = getattr(self, spec.up), getattr(self, spec.down), getattr(self, spec.dropout or "_", None)
        adds = residual is not None and not (dropout is not None and drops(dropout))
        (y,) = feed_forward(hidden_states, [up], down, activation, residual if adds else None)
        if adds:  # while the product was in registers
            return y
        y = y if dropout is None else dropout(y)
        return y if residual is None else residual + y

    return forward


@functools.cache
def gated_mlp(spec: GatedMLP) -> Forward:
    def forward(self: Any, x: Tensor, residual: Tensor | None = None) -> Tensor:
        ups = [getattr(self, spec.gate), getattr(self, spec.up)]
        return feed_forward(x, ups, getattr(self, spec.down), "silu_mul", residual)[0]

    return forward


def drops(dropout: nn.Dropout) -> bool:
    return dropout.training and dropout.p > 0
