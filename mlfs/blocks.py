"""Blocks of a layer that run fused: elastic layers, and what transformers computes between them in passes of its own.

A family's table says which of its modules are such blocks (`Family.blocks`). The module stays what it is, with its
parts by their names; only its forward pass is one of those below. It computes the same as the module's own.
"""

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from mlfs.elastic import ElasticLayerNorm, ElasticLinear, ElasticRMSNorm, project
from mlfs.families import MLP, Activated, AddNorm, Block, GatedMLP, PreNorm, RotaryAttention, SelfAttention
from mlfs.ops.attention import packed_attention
from mlfs.ops.backend import backend_of
from mlfs.ops.rotary import rotary
from mlfs.sizes import RowSizes

Forward = Callable[..., Any]
_LINEAR = ("linear", "gate", "up", "down", "query", "key", "value", "out")  # roles in a block
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
        part = getattr(module, name, None) if name else None
        if role in _LINEAR and not isinstance(part, ElasticLinear):
            return None
        if role in ("norm", "mlp_norm") and not isinstance(part, (ElasticLayerNorm, ElasticRMSNorm)):
            return None
    if isinstance(spec, AddNorm):
        return _add_norm(spec)
    if isinstance(spec, SelfAttention):
        return _self_attention(spec, type(module).forward)
    if isinstance(spec, RotaryAttention):
        return _rotary_attention(spec, type(module).forward)
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
        (x,) = project(x, getattr(self, spec.gate), getattr(self, spec.up), gated=True)
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
        x, s = getattr(self, spec.norm).after(hidden_states)
        s, _ = getattr(self, spec.attention)(hidden_states=x, residual=s, **kwargs)
        x, s = getattr(self, spec.mlp_norm).after(s)
        return getattr(self, spec.mlp)(x, residual=s)

    return forward


@functools.cache
def _rotary_attention(spec: RotaryAttention, original: Forward) -> Forward:
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
        q, k, v = (t.unflatten(-1, (-1, self.head_dim)) for t in project(hidden_states, *layers))
        q = getattr(self, spec.query_norm)(q) if spec.query_norm else q
        k = getattr(self, spec.key_norm)(k) if spec.key_norm else k
        q, k, v = (t.transpose(1, 2) for t in (*rotary(q, k, *position_embeddings), v))
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, self.layer_idx)
        if spec.window:
            owner = self if spec.window == "module" else self.config
            kwargs["sliding_window"] = getattr(owner, "sliding_window", None)
        p = self.attention_dropout if self.training else 0.0
        o, weights = attend(self, q, k, v, attention_mask, dropout=p, scaling=self.scaling, **kwargs)
        return getattr(self, spec.out)(o.flatten(2), residual=residual), weights

    return forward


@functools.cache
def _self_attention(spec: SelfAttention, original: Forward) -> Forward:
    def forward(
        self: Any, hidden_states: Tensor, attention_mask: Tensor | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        attend = ALL_ATTENTION_FUNCTIONS.get(self.config._attn_implementation)
        offsets = attention_mask if attention_mask is not None and attention_mask.dim() == 1 else None  # of sequences
        if offsets is None and (attend is None or args or kwargs.get("past_key_values") is not None):
            return original(self, hidden_states, attention_mask, *args, **kwargs)
        layers = (getattr(self, name) for name in (spec.query, spec.key, spec.value))
        q, k, v = (t.unflatten(-1, (-1, self.attention_head_size)) for t in project(hidden_states, *layers))
        p = getattr(self, spec.dropout).p if self.training else 0.0
        if offsets is not None:
            o = packed_attention(q[0], k[0], v[0], offsets, self.scaling, p).unsqueeze(0)
            return o.flatten(2), None
        assert attend is not None
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        o, weights = attend(self, q, k, v, attention_mask, dropout=p, scaling=self.scaling, **kwargs)
        return o.flatten(2), weights

    return forward


# ---- without padding ------------------------------------------------------------------------------------------------

_packs: ContextVar[bool] = ContextVar("mlfs_packs", default=False)


@contextmanager
def without_padding(wanted: bool = True) -> Iterator[None]:
    """Inside the block, on CPUs, encoders (BERT, RoBERTa) run only the tokens that are no padding, where all rows begin
    with such a one. Their outputs are the same for these tokens, and those of zeros for the padding; hidden states of
    layers are (1, tokens, hidden), the tokens of all rows one after the other. Trainers do this by themselves."""
    token = _packs.set(wanted)
    try:
        yield
    finally:
        _packs.reset(token)


def reads_no_padding(inputs: Mapping[str, Any]) -> bool:
    """Whether the loss of a batch on the CPU is the same without its padding: labels are of whole rows, which heads
    take from the first token, or are ignored where there is padding."""
    labels, attention = inputs.get("labels"), inputs.get("attention_mask")
    if labels is None or labels.device.type != "cpu":
        return False
    if attention is None or labels.shape != attention.shape:
        return True
    return bool((labels[attention == 0] == -100).all())


@functools.cache
def packed_encoder(original: Forward) -> Forward:
    """The forward pass of an encoder that packs its sequences, runs its layers, and puts the padding back as zeros.

    The layers take the offsets of the sequences in place of the attention mask.
    """

    def forward(self: Any, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Any:
        tokens = _tokens(hidden_states, attention_mask) if _may_pack(self, hidden_states, kwargs) else None
        if tokens is None:
            return original(self, hidden_states, attention_mask=attention_mask, **kwargs)
        offsets = nn.functional.pad(tokens.sum(1).cumsum(0), (1, 0))
        index = tokens.flatten().nonzero()[:, 0]
        flat = hidden_states.flatten(0, 1).index_select(0, index).unsqueeze(0)
        out = original(self, flat, attention_mask=offsets, **kwargs)
        last = out.last_hidden_state[0]
        whole = last.new_zeros(tokens.numel(), last.shape[-1]).index_copy(0, index, last)
        out.last_hidden_state = whole.unflatten(0, tokens.shape)
        return out

    return forward


def _may_pack(encoder: Any, hidden_states: Tensor, others: Mapping[str, Any]) -> bool:
    return (
        not torch.compiler.is_compiling()  # which cannot trace a context variable
        and _packs.get()
        and backend_of(hidden_states) == "cpp"
        and not any(others.get(name) is not None for name in ("encoder_hidden_states", "past_key_values"))
        and not isinstance(encoder._follows[0].sizes, RowSizes)
    )


def _tokens(hidden_states: Tensor, mask: Tensor | None) -> Tensor | None:
    """Which tokens count (batch, length), from a mask (batch, 1, any, length) that is the same for every query: True,
    or 0 to be added. None where it is not, or a row begins with padding."""
    if mask is None:
        return torch.ones(hidden_states.shape[:2], dtype=torch.bool)
    if mask.dim() != 4 or mask.shape[:2] != (hidden_states.shape[0], 1):
        return None
    if mask.stride(2) and not torch.equal(mask, mask[:, :, :1].expand_as(mask)):
        return None
    row = mask[:, 0, 0]
    kept = row if row.dtype == torch.bool else row == 0
    return kept if bool(kept[:, 0].all()) else None  # a head may read the first token, whatever it is
