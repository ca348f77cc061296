"""Fused attention blocks."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from mlfs.elastic.joint import project
from mlfs.models.families.spec import RotaryAttention, SelfAttention
from mlfs.models.follow import Forward
from mlfs.models.fused.registry import registers
from mlfs.ops.attention import causal_attention, ragged_attention, takes_ranges
from mlfs.ops.rotary import rotary


@registers(RotaryAttention, linears=("query", "key", "value", "out"), others=("query_norm", "key_norm"))
def rotary_attention(block: RotaryAttention, own_forward: Forward) -> Forward:
    """Builds causal attention with rotary embeddings, plus `residual` where the layer hands one in."""

    def forward(
        self: Any,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        residual: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        attend = attention_function(self)
        if attend is None:  # eager attention, which each model has its own of
            x, weights = own_forward(
                self, hidden_states, position_embeddings, attention_mask, past_key_values, **kwargs
            )
            return x if residual is None else residual + x, weights
        q, k, v = _turned_heads(self, block, hidden_states, position_embeddings)
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, self.layer_idx)
        if block.window:
            owner = self if block.window == "module" else self.config
            kwargs["sliding_window"] = getattr(owner, "sliding_window", None)
        p = self.attention_dropout if self.training else 0.0
        # o: (batch, tokens, heads, head_dim)
        if _sees_all_before(self, k, attention_mask, kwargs) and takes_ranges(q, k, v):
            o, weights = causal_attention(q, k, v, self.scaling, p), None
        else:
            o, weights = attend(self, q, k, v, attention_mask, dropout=p, scaling=self.scaling, **kwargs)
        return getattr(self, block.out).followed_by(o.flatten(2), residual=residual), weights

    return forward


def _turned_heads(
    module: Any, block: RotaryAttention, x: Tensor, position_embeddings: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns queries and keys, turned by their positions, and values: each (batch, heads, tokens, head_dim)."""
    layers = (getattr(module, name) for name in (block.query, block.key, block.value))
    q, k, v = (t.view(*t.shape[:-1], -1, module.head_dim) for t in project(x, *layers))
    if block.query_norm:
        q = getattr(module, block.query_norm)(q)
    if block.key_norm:
        k = getattr(module, block.key_norm)(k)
    q, k = rotary(q, k, *position_embeddings)
    return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)


def _sees_all_before(module: Any, k: Tensor, mask: Tensor | None, options: Mapping[str, Any]) -> bool:
    """Tells whether no mask is needed: each query attends to its key and all before; k: (batch, heads, keys, dim)."""
    window = options.get("sliding_window")
    return (
        mask is None
        and module.is_causal
        and options.get("is_causal", True)
        and module.config._attn_implementation == "sdpa"
        and (window is None or k.shape[2] <= window)
    )


@registers(SelfAttention, linears=("query", "key", "value"), others=("dropout",))
def self_attention(block: SelfAttention, own_forward: Forward) -> Forward:
    """Builds attention both ways, under a mask or, without padding, within ranges."""

    def forward(
        self: Any, hidden_states: Tensor, attention_mask: Tensor | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        if not are_ranges(attention_mask):
            has_cache = kwargs.get("past_key_values") is not None
            if args or has_cache or attention_function(self) is None:
                return own_forward(self, hidden_states, attention_mask, *args, **kwargs)
        layers = (getattr(self, name) for name in (block.query, block.key, block.value))
        heads = project(hidden_states, *layers)
        return attend_both_ways(self, heads, attention_mask, getattr(self, block.dropout), kwargs)

    return forward


def attend_both_ways(
    module: Any, heads: Sequence[Tensor], mask: Tensor | None, dropout: nn.Dropout, options: Mapping[str, Any]
) -> tuple[Tensor, Tensor | None]:
    """Computes attention in which each query may see all keys, under a mask or within ranges (`mlfs.ops.attention`).

    Args:
        module: transformers' attention module, with `attention_head_size` and `scaling`.
        heads: query, key and value, each (batch, tokens, heads * head_dim).
        options: more keyword arguments of transformers' attention function.

    Returns:
        (batch, tokens, heads * head_dim), and the weights of attention, or None where they are not kept.
    """
    q, k, v = (t.view(*t.shape[:-1], -1, module.attention_head_size) for t in heads)
    p = dropout.p if module.training else 0.0
    if mask is not None and are_ranges(mask):
        return ragged_attention(q, k, v, mask, module.scaling, p=p).flatten(2), None
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    attend = ALL_ATTENTION_FUNCTIONS[module.config._attn_implementation]
    o, weights = attend(module, q, k, v, mask, dropout=p, scaling=module.scaling, **options)
    return o.flatten(2), weights


def attention_function(module: Any) -> Any:
    """Returns transformers' attention function for the module; None for eager attention, which is the model's own."""
    return ALL_ATTENTION_FUNCTIONS.get(module.config._attn_implementation)


def are_ranges(mask: Tensor | None) -> bool:
    """Tells ranges (`mlfs.ops.attention`), which are int64, from transformers' attention masks, which never are."""
    return mask is not None and mask.dtype == torch.long
