"""Fused blocks that hold a norm: a norm of a sum, and whole layers with their norms before or after their parts."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mlfs.elastic.joint import feed_forward, project
from mlfs.elastic.linear import ElasticLinear
from mlfs.elastic.norm import ElasticNorm
from mlfs.models.families.spec import AddNorm, PostNorm, PreNorm
from mlfs.models.follow import Forward
from mlfs.models.fused.attention import are_ranges, attend_both_ways, attention_function
from mlfs.models.fused.mlp import drops
from mlfs.models.fused.registry import GELUS, Activation, registers
from mlfs.ops.actions import trains_fused
from mlfs.ops.encoder_layer import EncoderLayer, encoder_layer
from mlfs.ops.observers import have_hooks


@registers(AddNorm, linears=("linear",), norms=("norm",), others=("dropout",))
def add_norm(block: AddNorm, own_forward: Forward) -> Forward:
    """Builds norm(dropout(linear(x)) + residual)."""

    def forward(self: Any, hidden_states: Tensor, input_tensor: Tensor) -> Tensor:
        linear, dropout, norm = (getattr(self, name) for name in (block.linear, block.dropout, block.norm))
        if have_hooks(dropout, norm):
            return own_forward(self, hidden_states, input_tensor)
        return _norm_of_sum(linear, dropout, norm, hidden_states, input_tensor)

    return forward


def _norm_of_sum(linear: ElasticLinear, dropout: nn.Dropout, norm: ElasticNorm, x: Tensor, residual: Tensor) -> Tensor:
    """Computes norm(dropout(linear(x)) + residual)."""
    if drops(dropout):
        return norm.after(linear(x), residual, dropout.p)[0]
    return norm(linear.followed_by(x, residual=residual))  # added while the product is in registers


@registers(PreNorm, norms=("norm", "mlp_norm"), others=("attention", "mlp"))
def pre_norm(block: PreNorm, own_forward: Forward) -> Forward:
    """Builds s + mlp(mlp_norm(s)) for s = x + attention(norm(x)); both sums are added inside a part or a norm.

    If a part has hooks, or the layer attends to an encoder, it runs its own forward.
    """
    parameters = list(inspect.signature(own_forward).parameters.values())[2:]  # after self and hidden_states
    defaults = {p.name: p.default for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD}

    def forward(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        options = defaults | dict(zip(defaults, args, strict=False)) | kwargs
        norm, mlp_norm = getattr(self, block.norm), getattr(self, block.mlp_norm)
        attention, mlp = getattr(self, block.attention), getattr(self, block.mlp)
        attends_to_encoder = options.pop("encoder_hidden_states", None) is not None
        if attends_to_encoder or have_hooks(norm, mlp_norm, attention, mlp):
            return own_forward(self, hidden_states, *args, **kwargs)
        options.pop("encoder_attention_mask", None)
        x, s = norm.after(hidden_states)
        if block.attention_adds:
            s, _ = attention(hidden_states=x, residual=s, **options)
            x, s = mlp_norm.after(s)
        else:
            o, _ = attention(x, **options)
            x, s = mlp_norm.after(o, residual=s)
        return mlp(x, residual=s)

    return forward


class _PostNormParts(NamedTuple):
    """The submodules of a layer of the kind `PostNorm`, without its dropouts."""

    attention: Any
    query: ElasticLinear
    key: ElasticLinear
    value: ElasticLinear
    attention_out: ElasticLinear
    norm: ElasticNorm
    up: ElasticLinear
    down: ElasticLinear
    last_norm: ElasticNorm


_DROPOUTS = ("attention_dropout", "out_dropout", "down_dropout")


@registers(
    PostNorm,
    linears=("query", "key", "value", "attention_out", "up", "down"),
    norms=("norm", "last_norm"),
    others=("attention", *_DROPOUTS),
    activations=GELUS,
)
def post_norm(block: PostNorm, own_forward: Forward, activation: Activation) -> Forward:
    """Builds last_norm(t + down(activation(up(t)))) for t = norm(x + attention_out(attention(x))).

    If no submodule has hooks: on GPUs in training, runs query, key and value, and the feed-forward block, as fused
    operators, which also add up the gradients of all that reads their input; on CPUs, within ranges, without gradients
    and dropout, runs the whole layer in one call. Otherwise the layer runs its own forward, part by part.
    """
    names = [getattr(block, role) for role in _PostNormParts._fields]
    parents = {name.rpartition(".")[0] for name in names}
    parts_of = _getter(names)
    dropouts_of = _getter([getattr(block, role) for role in _DROPOUTS])
    containers_of = _getter(sorted(parents - {"", *names} | {block.activation}))

    def forward(
        self: Any,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        if trains_fused(hidden_states):
            parts, dropouts = _PostNormParts(*parts_of(self)), dropouts_of(self)
            attends_elsewhere = encoder_hidden_states is not None or kwargs.get("past_key_values") is not None or args
            if (
                not have_hooks(*parts, *dropouts, *containers_of(self))
                and attention_function(parts.attention) is not None
                and not attends_elsewhere
                and not self.chunk_size_feed_forward
            ):
                return _train_post_norm(parts, dropouts, activation.name, hidden_states, attention_mask, kwargs)
        elif not self.training and attention_mask is not None and are_ranges(attention_mask):
            parts = _PostNormParts(*parts_of(self))
            if not have_hooks(*parts, *dropouts_of(self), *containers_of(self)):
                y = encoder_layer(hidden_states, _layer_of(parts, activation.name), attention_mask)
                if y is not None:
                    return y
        return own_forward(self, hidden_states, attention_mask, encoder_hidden_states, *args, **kwargs)

    return forward


def _train_post_norm(
    parts: _PostNormParts,
    dropouts: Sequence[nn.Dropout],
    activation: str,
    x: Tensor,
    mask: Tensor | None,
    options: Mapping[str, Any],
) -> Tensor:
    """Runs a layer by fused operators. Each returns its input too, so that the gradients of the residual streams are
    added inside its backward pass."""
    attention_dropout, out_dropout, down_dropout = dropouts
    *heads, x = project(x, parts.query, parts.key, parts.value, returns_input=True)
    unused = ("encoder_attention_mask", "past_key_values")  # of transformers' attention function
    options = {name: value for name, value in options.items() if name not in unused}
    o, _ = attend_both_ways(parts.attention, heads, mask, attention_dropout, options)
    t = _norm_of_sum(parts.attention_out, out_dropout, parts.norm, o, x)
    if not drops(down_dropout):
        (s,) = feed_forward(t, [parts.up], parts.down, activation, residual=t)
        return parts.last_norm(s)
    y, t = feed_forward(t, [parts.up], parts.down, activation, returns_input=True)
    return parts.last_norm.after(y, t, down_dropout.p)[0]


def _layer_of(parts: _PostNormParts, activation: str) -> EncoderLayer:
    """Reads the layer's tensors under the active subnet."""
    return EncoderLayer(
        query=parts.query.reads_now(),
        key=parts.key.reads_now(),
        value=parts.value.reads_now(),
        out=parts.attention_out.reads_now(),
        norm=parts.norm.reads_now(),
        up=parts.up.reads_now(),
        activation=activation,
        down=parts.down.reads_now(),
        last_norm=parts.last_norm.reads_now(),
        head_dim=parts.attention.attention_head_size,
        scale=parts.attention.scaling,
    )


def _getter(names: Sequence[str]) -> Callable[[nn.Module], tuple[Any, ...]]:
    """Builds a function that returns the submodules of these names, of which there are two or more."""
    paths = [name.split(".") for name in names]
    by_attributes = attrgetter(*names)

    def get(module: nn.Module) -> tuple[Any, ...]:
        if torch.compiler.is_compiling():  # which cannot trace an attrgetter
            return tuple(module.get_submodule(name) for name in names)
        found = []
        try:  # nn.Module's own dictionaries: attributes of it take seven times as long
            for path in paths:
                part: Any = module
                for name in path:
                    part = part._modules[name]
                found.append(part)
        except KeyError:  # a wrapper between, which hands attributes on
            return by_attributes(module)
        return tuple(found)

    return get
