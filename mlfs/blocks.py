"""Blocks of a layer that run fused: elastic layers, and what transformers computes between them in passes of its own.

A family's table says which of its modules are such blocks (`Family.blocks`). The module stays what it is, with its
parts by their names; only its forward pass is one of those below. It computes the same as the module's own.
"""

import functools
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from transformers.activations import ACT2FN

from mlfs.elastic import ElasticLayerNorm, ElasticLinear, ElasticRMSNorm
from mlfs.families import MLP, Activated, AddNorm, Block, GatedMLP, PreNorm
from mlfs.ops.backend import backend_of

Forward = Callable[..., Any]
_KNOWN = {
    type(ACT2FN[name]): activation
    for name, activation in (
        ("gelu", "gelu"),
        ("gelu_new", "gelu_tanh"),
        ("gelu_pytorch_tanh", "gelu_tanh"),
        ("silu", "silu_mul"),
    )
}


def fused_forward(module: nn.Module, spec: Block) -> Forward | None:
    """The forward pass of `module` (a function of it and its inputs), or None where it has to run as it is: its
    activation is none the kernels know, or a part is not elastic."""
    for role, name in vars(spec).items():
        part = getattr(module, name) if name else None
        if role in ("linear", "gate", "up", "down") and not isinstance(part, ElasticLinear):
            return None
        if role in ("norm", "mlp_norm") and not isinstance(part, (ElasticLayerNorm, ElasticRMSNorm)):
            return None
    if isinstance(spec, AddNorm):
        return _add_norm(spec)
    if isinstance(spec, PreNorm):
        return _pre_norm(spec, type(module).forward)
    activation = _KNOWN.get(type(getattr(module, spec.activation)))
    if activation is None or (activation == "silu_mul") != isinstance(spec, GatedMLP):
        return None
    if isinstance(spec, GatedMLP):
        return _gated_mlp(spec)
    forward = _activated(spec, activation) if isinstance(spec, Activated) else _mlp(spec, activation)
    # transformers writes this one out, which rounds otherwise: without kernels nothing is gained by another way
    written_out = type(getattr(module, spec.activation)) is type(ACT2FN["gelu_new"])
    return _with_kernels(forward, type(module).forward) if written_out else forward


@functools.cache
def _with_kernels(fused: Forward, original: Forward) -> Forward:
    def forward(self: Any, hidden_states: Tensor) -> Tensor:
        return (original if backend_of(hidden_states) == "reference" else fused)(self, hidden_states)

    return forward


@functools.cache
def _activated(spec: Activated, activation: str) -> Forward:
    def forward(self: Any, hidden_states: Tensor) -> Tensor:
        return getattr(self, spec.linear)(hidden_states, activation=activation)

    return forward


@functools.cache
def _mlp(spec: MLP, activation: str) -> Forward:
    def forward(self: Any, hidden_states: Tensor) -> Tensor:
        hidden_states = getattr(self, spec.up)(hidden_states, activation=activation)
        hidden_states = getattr(self, spec.down)(hidden_states)
        return getattr(self, spec.dropout)(hidden_states) if spec.dropout else hidden_states

    return forward


@functools.cache
def _gated_mlp(spec: GatedMLP) -> Forward:
    def forward(self: Any, x: Tensor, residual: Tensor | None = None) -> Tensor:
        up = getattr(self, spec.up)(x)
        x = getattr(self, spec.gate)(x, activation="silu_mul", operand=up)
        return getattr(self, spec.down)(x, residual=residual)

    return forward


@functools.cache
def _add_norm(spec: AddNorm) -> Forward:
    def forward(self: Any, hidden_states: Tensor, input_tensor: Tensor) -> Tensor:
        linear, dropout, norm = (getattr(self, name) for name in (spec.linear, spec.dropout, spec.norm))
        if self.training and dropout.p:
            return norm.after(linear(hidden_states), input_tensor, dropout.p)[0]
        return norm(linear(hidden_states, residual=input_tensor))  # added while the product is in registers

    return forward


@functools.cache
def _pre_norm(spec: PreNorm, original: Forward) -> Forward:
    def forward(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        if args:  # by position they could be anything
            return original(self, hidden_states, *args, **kwargs)
        x = getattr(self, spec.norm)(hidden_states)
        x, _ = getattr(self, spec.attention)(hidden_states=x, **kwargs)
        x, hidden_states = getattr(self, spec.mlp_norm).after(x, hidden_states)
        return getattr(self, spec.mlp)(x, residual=hidden_states)

    return forward
