"""Whole layers that run fused, before and after their norms."""

import functools
import inspect
from collections.abc import Callable, Sequence
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from mlfs.elastic.joint import feed_forward, project
from mlfs.elastic.linear import ElasticLinear
from mlfs.elastic.norm import ElasticNorm
from mlfs.models.families.spec import AddNorm, PostNorm, PreNorm
from mlfs.models.fused.attention import attend_both_ways
from mlfs.models.fused.mlp import Forward, drops
from mlfs.ops.backend import backend_of, is_direct
from mlfs.ops.layers import encoder_layer


@functools.cache
def add_norm(spec: AddNorm) -> Forward:
    def forward(self: Any, hidden_states: Tensor, input_tensor: Tensor) -> Tensor:
        linear, dropout, norm = (getattr(self, name) for name in (spec.linear, spec.dropout, spec.norm))
        return _norm_of_sum(linear, dropout, norm, hidden_states, input_tensor)

    return forward


def _norm_of_sum(linear: ElasticLinear, dropout: nn.Dropout, norm: ElasticNorm, x: Tensor, residual: Tensor) -> Tensor:
    if drops(dropout):
        return norm.after(linear(x), residual, dropout.p)[0]
    return norm(linear(x, residual=residual))  # added while the product is in registers


@functools.cache
def pre_norm(spec: PreNorm, original: Forward) -> Forward:
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
def post_norm(spec: PostNorm, activation: str, original: Forward) -> Forward:
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
                *heads, s = project(hidden_states, q, k, v, returns_input=True)
                unused = ("encoder_attention_mask", "past_key_values")
                options = {name: value for name, value in kwargs.items() if name not in unused}
                x, _ = attend_both_ways(attention, heads, attention_mask, dropouts[0], options)
                t = _norm_of_sum(out, dropouts[1], norm, x, s)
                if not drops(dropouts[2]):
                    return last_norm(feed_forward(t, [up], down, activation, residual=t)[0])
                y, t = feed_forward(t, [up], down, activation, returns_input=True)
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
