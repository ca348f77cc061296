"""Blocks of a layer that run fused: elastic layers, and what transformers computes between them in passes of its own.

A family's table says which of its modules are such blocks (`Family.blocks`). The module stays what it is, with its
parts by their names; only its forward pass is one of those below. It computes the same as the module's own.
"""

from operator import attrgetter

from torch import nn
from transformers.activations import ACT2FN

from mlfs.elastic.linear import ElasticLinear
from mlfs.elastic.norm import ElasticLayerNorm, ElasticRMSNorm
from mlfs.models.families.spec import (
    Activated,
    AddNorm,
    Block,
    GatedMLP,
    PostNorm,
    PreNorm,
    RotaryAttention,
    SelfAttention,
)
from mlfs.models.fused.attention import rotary_attention, self_attention
from mlfs.models.fused.layer import add_norm, post_norm, pre_norm
from mlfs.models.fused.mlp import KNOWN_ACTIVATIONS, Forward, activated, gated_mlp, mlp, with_kernels

_LINEAR = ("linear", "gate", "up", "down", "query", "key", "value", "out", "attention_out")  # roles in a block


def fused_forward(module: nn.Module, spec: Block) -> Forward | None:
    """The forward pass of `module` (a function of it and its inputs), or None where it has to run as it is: its
    activation is none the kernels know, or a part is not elastic."""
    for role, name in vars(spec).items():
        part = attrgetter(name)(module) if name and role not in ("window", "attention_adds") else None
        if role in _LINEAR and not isinstance(part, ElasticLinear):
            return None
        if role in ("norm", "mlp_norm", "last_norm") and not isinstance(part, (ElasticLayerNorm, ElasticRMSNorm)):
            return None
    if isinstance(spec, AddNorm):
        return add_norm(spec)
    if isinstance(spec, SelfAttention):
        return self_attention(spec, type(module).forward)
    if isinstance(spec, RotaryAttention):
        return rotary_attention(spec, type(module).forward)
    if isinstance(spec, PreNorm):
        return pre_norm(spec, type(module).forward)
    activation = KNOWN_ACTIVATIONS.get(type(attrgetter(spec.activation)(module)))
    if activation is None or (activation == "silu_mul") != isinstance(spec, GatedMLP):
        return None
    if isinstance(spec, PostNorm):
        return post_norm(spec, activation, type(module).forward)
    if isinstance(spec, GatedMLP):
        return gated_mlp(spec)
    forward = activated(spec, activation) if isinstance(spec, Activated) else mlp(spec, activation)
    # transformers writes this one out, which rounds otherwise: without kernels nothing is gained by another way
    written_out = type(getattr(module, spec.activation)) is type(ACT2FN["gelu_new"])
    return with_kernels(forward, type(module).forward) if written_out else forward
