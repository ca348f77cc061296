"""Blocks of a layer that run fused: elastic layers, and what transformers computes between them in passes of its own.

A family's table says which of its modules are such blocks (`Family.blocks`). The module stays what it is, with its
parts by their names; only its forward pass is one of those below. It computes the same as the module's own.
"""

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from mlfs.elastic import ElasticLayerNorm, ElasticLinear, ElasticNorm, ElasticRMSNorm, feed_forward, project
from mlfs.families import MLP, Activated, AddNorm, Block, GatedMLP, PostNorm, PreNorm, RotaryAttention, SelfAttention
from mlfs.ops.attention import ragged_attention, ranges_of_keys, ranges_of_sequences
from mlfs.ops.backend import autocast_type, backend_of, is_direct
from mlfs.ops.layers import encoder_layer
from mlfs.ops.rotary import rotary
from mlfs.sizes import RowSizes

Forward = Callable[..., Any]
_LINEAR = ("linear", "gate", "up", "down", "query", "key", "value", "out", "attention_out")  # roles in a block
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
        part = attrgetter(name)(module) if name and role not in ("window", "attention_adds") else None
        if role in _LINEAR and not isinstance(part, ElasticLinear):
            return None
        if role in ("norm", "mlp_norm", "last_norm") and not isinstance(part, (ElasticLayerNorm, ElasticRMSNorm)):
            return None
    if isinstance(spec, AddNorm):
        return _add_norm(spec)
    if isinstance(spec, SelfAttention):
        return _self_attention(spec, type(module).forward)
    if isinstance(spec, RotaryAttention):
        return _rotary_attention(spec, type(module).forward)
    if isinstance(spec, PreNorm):
        return _pre_norm(spec, type(module).forward)
    activation = _KNOWN.get(type(attrgetter(spec.activation)(module)))
    if activation is None or (activation == "silu_mul") != isinstance(spec, GatedMLP):
        return None
    if isinstance(spec, PostNorm):
        return _post_norm(spec, activation, type(module).forward)
    if isinstance(spec, GatedMLP):
        return _gated_mlp(spec)
    forward = _activated(spec, activation) if isinstance(spec, Activated) else _mlp(spec, activation)
    # transformers writes this one out, which rounds otherwise: without kernels nothing is gained by another way
    written_out = type(getattr(module, spec.activation)) is type(ACT2FN["gelu_new"])
    return _with_kernels(forward, type(module).forward) if written_out else forward


@functools.cache
def _with_kernels(fused: Forward, original: Forward) -> Forward:
    def forward(self: Any, hidden_states: Tensor, **more: Any) -> Tensor:
        if backend_of(hidden_states) != "reference":
            return fused(self, hidden_states, **more)
        y, residual = original(self, hidden_states), more.get("residual")
        return y if residual is None else residual + y

    return forward


@functools.cache
def _activated(spec: Activated, activation: str) -> Forward:
    def forward(self: Any, hidden_states: Tensor) -> Tensor:
        return getattr(self, spec.linear)(hidden_states, activation=activation)

    return forward


@functools.cache
def _mlp(spec: MLP, activation: str) -> Forward:
    def forward(self: Any, hidden_states: Tensor, residual: Tensor | None = None) -> Tensor:
        up, down, dropout = getattr(self, spec.up), getattr(self, spec.down), getattr(self, spec.dropout or "_", None)
        adds = residual is not None and not (dropout is not None and _drops(dropout))
        (y,) = feed_forward(hidden_states, [up], down, activation, residual if adds else None)
        if adds:  # while the product was in registers
            return y
        y = y if dropout is None else dropout(y)
        return y if residual is None else residual + y

    return forward


@functools.cache
def _gated_mlp(spec: GatedMLP) -> Forward:
    def forward(self: Any, x: Tensor, residual: Tensor | None = None) -> Tensor:
        ups = [getattr(self, spec.gate), getattr(self, spec.up)]
        return feed_forward(x, ups, getattr(self, spec.down), "silu_mul", residual)[0]

    return forward


@functools.cache
def _add_norm(spec: AddNorm) -> Forward:
    def forward(self: Any, hidden_states: Tensor, input_tensor: Tensor) -> Tensor:
        linear, dropout, norm = (getattr(self, name) for name in (spec.linear, spec.dropout, spec.norm))
        return _norm_of_sum(linear, dropout, norm, hidden_states, input_tensor)

    return forward


def _norm_of_sum(linear: ElasticLinear, dropout: nn.Dropout, norm: ElasticNorm, x: Tensor, residual: Tensor) -> Tensor:
    if _drops(dropout):
        return norm.after(linear(x), residual, dropout.p)[0]
    return norm(linear(x, residual=residual))  # added while the product is in registers


def _drops(dropout: nn.Dropout) -> bool:
    return dropout.training and dropout.p > 0


@functools.cache
def _pre_norm(spec: PreNorm, original: Forward) -> Forward:
    parameters = list(inspect.signature(original).parameters.values())[2:]  # after self and hidden_states
    defaults = {p.name: p.default for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD}

    def forward(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        given = defaults | dict(zip(defaults, args, strict=False)) | kwargs
        norm, mlp_norm = getattr(self, spec.norm), getattr(self, spec.mlp_norm)
        if given.pop("encoder_hidden_states", None) is not None or _watched([norm, mlp_norm]):
            return original(self, hidden_states, *args, **kwargs)
        given.pop("encoder_attention_mask", None)
        x, s = norm.after(hidden_states)
        if spec.attention_adds:
            s, _ = getattr(self, spec.attention)(hidden_states=x, residual=s, **given)
            x, s = mlp_norm.after(s)
        else:
            o, _ = getattr(self, spec.attention)(x, **given)
            x, s = mlp_norm.after(o, residual=s)
        return getattr(self, spec.mlp)(x, residual=s)

    return forward


@functools.cache
def _post_norm(spec: PostNorm, activation: str, original: Forward) -> Forward:
    """Where nobody watches its parts: in training on kernels, with sums of gradients in the products; on CPUs, without
    gradients and dropout, by one call of the extension."""
    names = {role: name for role, name in vars(spec).items() if role != "activation"}
    dropouts = [names.pop(role) for role in ("attention_dropout", "out_dropout", "down_dropout")]
    parents = {name.rpartition(".")[0] for name in names.values()}
    parts_of, dropouts_of = _getter(list(names.values())), _getter(dropouts)
    outer_of = _getter(sorted(parents - {"", *names.values()}))

    def forward(
        self: Any,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        if torch.is_grad_enabled() and backend_of(hidden_states) == "triton":
            parts, dropouts = parts_of(self), dropouts_of(self)
            attention, q, k, v, out, norm, up, down, last_norm = parts
            elsewhere = encoder_hidden_states is not None or kwargs.get("past_key_values") is not None or args
            known = ALL_ATTENTION_FUNCTIONS.get(attention.config._attn_implementation) is not None
            free = not _watched((*parts, *dropouts, *outer_of(self)))
            if free and known and not elsewhere and not self.chunk_size_feed_forward:
                *heads, s = project(hidden_states, q, k, v, carries=True)
                unused = ("encoder_attention_mask", "past_key_values")
                options = {name: value for name, value in kwargs.items() if name not in unused}
                x, _ = _attend(attention, heads, attention_mask, dropouts[0], options)
                t = _norm_of_sum(out, dropouts[1], norm, x, s)
                if not _drops(dropouts[2]):
                    return last_norm(feed_forward(t, [up], down, activation, residual=t)[0])
                y, t = feed_forward(t, [up], down, activation, carries=True)
                return last_norm.after(y, t, dropouts[2].p)[0]
        elif not self.training and attention_mask is not None and attention_mask.dtype == torch.long:
            parts = parts_of(self)
            attention, q, k, v, out, norm, up, down, last_norm = parts
            layers = [linear.reads_now() for linear in (q, k, v, out, up, down)]
            if is_direct(hidden_states, *(layer[0] for layer in layers)) and not _watched((*parts, *outer_of(self))):
                return encoder_layer(
                    hidden_states, layers[:3], layers[3], norm.reads_now(), layers[4], activation, layers[5],
                    last_norm.reads_now(), attention_mask, attention.attention_head_size, attention.scaling,
                )  # fmt: skip
        return original(self, hidden_states, attention_mask, encoder_hidden_states, *args, **kwargs)

    return forward


def _getter(names: Sequence[str]) -> Callable[[nn.Module], tuple[Any, ...]]:
    """A function that gives the submodules of these names."""
    of = attrgetter(*names)

    def parts(module: nn.Module) -> tuple[Any, ...]:
        if torch.compiler.is_compiling():  # which cannot trace the faster one
            return tuple(module.get_submodule(name) for name in names)
        return of(module)

    return parts


def _watched(modules: Sequence[nn.Module]) -> bool:
    """Whether someone has hooks on their calls."""
    return any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks for m in modules)


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
def _self_attention(spec: SelfAttention, original: Forward) -> Forward:
    def forward(
        self: Any, hidden_states: Tensor, attention_mask: Tensor | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        attend = ALL_ATTENTION_FUNCTIONS.get(self.config._attn_implementation)
        ranges = attention_mask if attention_mask is not None and attention_mask.dtype == torch.long else None
        if ranges is None and (attend is None or args or kwargs.get("past_key_values") is not None):
            return original(self, hidden_states, attention_mask, *args, **kwargs)
        layers = (getattr(self, name) for name in (spec.query, spec.key, spec.value))
        heads = project(hidden_states, *layers)
        return _attend(self, heads, attention_mask, getattr(self, spec.dropout), kwargs)

    return forward


def _attend(
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
def ragged_encoder(original: Forward) -> Forward:
    """The forward pass of an encoder whose layers take ranges (`mlfs.ops.attention`) in place of the attention mask: no
    attention is computed to padding, and where it packs, nothing for padding, which is put back as zeros.
    """

    def forward(self: Any, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Any:
        kept = _kept(hidden_states, attention_mask) if _takes_ranges(self, hidden_states, kwargs) else None
        if kept is None:
            return original(self, hidden_states, attention_mask=attention_mask, **kwargs)
        if not (_packs.get() and bool(kept[:, 0].all())):  # a head may read the first token, whatever it is
            ranges = _key_ranges(kept)
            return original(self, hidden_states, attention_mask=attention_mask if ranges is None else ranges, **kwargs)
        index = kept.flatten().nonzero()[:, 0]
        flat = hidden_states.flatten(0, 1).index_select(0, index).unsqueeze(0)
        out = original(self, flat, attention_mask=ranges_of_sequences(kept.sum(1).cumsum(0).tolist()), **kwargs)
        last = out.last_hidden_state[0]
        whole = last.new_zeros(kept.numel(), last.shape[-1]).index_copy(0, index, last)
        out.last_hidden_state = whole.unflatten(0, kept.shape)
        return out

    return forward


def _takes_ranges(encoder: Any, hidden_states: Tensor, others: Mapping[str, Any]) -> bool:
    return (
        not torch.compiler.is_compiling()  # which cannot trace a context variable
        and backend_of(hidden_states) == "cpp"
        and (_packs.get() or autocast_type(hidden_states) is None)
        # others are the user's own; eager attention may be asked for its weights
        and encoder.config._attn_implementation in (("sdpa", "eager") if _packs.get() else ("sdpa",))
        and not encoder.config.is_decoder  # which attends to what is before
        and not any(others.get(name) is not None for name in ("encoder_hidden_states", "past_key_values"))
        and not isinstance(encoder._follows[0].sizes, RowSizes)
    )


def _kept(hidden_states: Tensor, mask: Tensor | None) -> Tensor | None:
    """Which tokens count (batch, length), from a mask (batch, 1, any, length) that is the same for every query: True,
    or 0 to be added, not the lowest number. None where it is not, or where it weighs keys."""
    if mask is None:
        return torch.ones(hidden_states.shape[:2], dtype=torch.bool)
    if mask.dim() != 4 or mask.shape[:2] != (hidden_states.shape[0], 1):
        return None
    if mask.stride(2) and not torch.equal(mask, mask[:, :, :1].expand_as(mask)):
        return None
    row = mask[:, 0, 0]
    if row.dtype == torch.bool:
        return row
    kept, left_out = row == 0, row <= torch.finfo(row.dtype).min / 2
    return kept if bool((kept | left_out).all()) else None


def _key_ranges(kept: Tensor) -> Tensor | None:
    """Ranges of rows that count (batch, length); None where a row has no token that counts, or a gap."""
    rows = kept.tolist()
    keys = [(row.index(True), len(row) - row[::-1].index(True)) for row in rows if True in row]
    if len(keys) < len(rows) or any(last - first != sum(row) for (first, last), row in zip(keys, rows, strict=True)):
        return None
    return ranges_of_keys(keys, kept.shape[1])
