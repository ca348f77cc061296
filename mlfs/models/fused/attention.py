"""Attention blocks that run fused."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from mlfs.elastic.joint import project
from mlfs.models.families.spec import RotaryAttention, SelfAttention
from mlfs.models.fused.mlp import Forward
from mlfs.ops.attention import ragged_attention, ranges_of_keys
from mlfs.ops.backend import backend_of
from mlfs.ops.rotary import rotary


@functools.cache
def rotary_attention(spec: RotaryAttention, original: Forward) -> Forward:
    def forward(
        self: Any,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        residual: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        attend = ALL_ATTENTION_FUNCTIONS.get(self.config._attn_implementation)
        if attend is None:  # eager attention, which each model has its own of
            x, weights = original(self, hidden_states, position_embeddings, attention_mask, past_key_values, **kwargs)
            return x if residual is None else residual + x, weights
        layers = (getattr(self, name) for name in (spec.query, spec.key, spec.value))
        q, k, v = (t.view(*t.shape[:-1], -1, self.head_dim) for t in project(hidden_states, *layers))
        q = getattr(self, spec.query_norm)(q) if spec.query_norm else q
        k = getattr(self, spec.key_norm)(k) if spec.key_norm else k
        q, k, v = (t.transpose(1, 2) for t in (*rotary(q, k, *position_embeddings), v))
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, self.layer_idx)
        if spec.window:
            owner = self if spec.window == "module" else self.config
            kwargs["sliding_window"] = getattr(owner, "sliding_window", None)
        p = self.attention_dropout if self.training else 0.0
        if _sees_all_before(self, q, k, attention_mask, kwargs):
            ranges = ranges_of_keys([(0, k.shape[2])] * k.shape[0], q.shape[2], k.shape[2] - q.shape[2])
            q, k, v = (t.transpose(1, 2) for t in (q, k, v))
            o, weights = ragged_attention(q, k, v, ranges, self.scaling, causal=True, p=p), None
        else:
            o, weights = attend(self, q, k, v, attention_mask, dropout=p, scaling=self.scaling, **kwargs)
        return getattr(self, spec.out)(o.flatten(2), residual=residual), weights

    return forward


def _sees_all_before(module: Any, q: Tensor, k: Tensor, mask: Tensor | None, options: Mapping[str, Any]) -> bool:
    """Whether each query sees its key and all before it, and the extension for CPUs may compute that."""
    window = options.get("sliding_window")
    return (
        mask is None
        and module.is_causal
        and options.get("is_causal", True)
        and module.config._attn_implementation == "sdpa"
        and (window is None or k.shape[2] <= window)
        and not torch.compiler.is_compiling()
        and backend_of(q, k) == "cpp"
    )


@functools.cache
def self_attention(spec: SelfAttention, original: Forward) -> Forward:
    def forward(
        self: Any, hidden_states: Tensor, attention_mask: Tensor | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        attend = ALL_ATTENTION_FUNCTIONS.get(self.config._attn_implementation)
        ranges = attention_mask if attention_mask is not None and attention_mask.dtype == torch.long else None
        if ranges is None and (attend is None or args or kwargs.get("past_key_values") is not None):
            return original(self, hidden_states, attention_mask, *args, **kwargs)
        layers = (getattr(self, name) for name in (spec.query, spec.key, spec.value))
        heads = project(hidden_states, *layers)
        return attend_both_ways(self, heads, attention_mask, getattr(self, spec.dropout), kwargs)

    return forward


def attend_both_ways(
    module: Any, heads: Sequence[Tensor], mask: Tensor | None, dropout: nn.Dropout, options: Mapping[str, Any]
) -> tuple[Tensor, Tensor | None]:
    """(Attention, its weights or None) both ways between query, key and value, each (batch, length, heads side by
    side), under a mask or ranges."""
    q, k, v = (t.view(*t.shape[:-1], -1, module.attention_head_size) for t in heads)
    p = dropout.p if module.training else 0.0
    if mask is not None and mask.dtype == torch.long:
        return ragged_attention(q, k, v, mask, module.scaling, p=p).flatten(2), None
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    attend = ALL_ATTENTION_FUNCTIONS[module.config._attn_implementation]
    o, weights = attend(module, q, k, v, mask, dropout=p, scaling=module.scaling, **options)
    return o.flatten(2), weights
