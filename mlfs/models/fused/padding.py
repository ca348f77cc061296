"""Encoders that compute nothing for padding."""

import functools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from mlfs.models.follow import Forward, scope_of
from mlfs.ops.attention import autocasts, gains_without_padding, ranges_of_keys, ranges_of_sequences, takes_ranges
from mlfs.space.dimensions import RowSizes

_packs: ContextVar[bool] = ContextVar("mlfs_packs", default=False)


@contextmanager
def without_padding(wanted: bool = True) -> Iterator[None]:
    """Runs encoders (BERT, RoBERTa) on CPUs without the tokens that are padding, inside the block.

    Only where all rows begin with a token that is none. Outputs are the same for the other tokens, and those of zeros
    for the padding; hidden states of layers are (1, tokens, hidden), the tokens of all rows one after the other.
    Trainers do this by themselves.
    """
    token = _packs.set(wanted)
    try:
        yield
    finally:
        _packs.reset(token)


def reads_no_padding(inputs: Mapping[str, Any]) -> bool:
    """Tells whether the loss of a batch on the CPU is the same without its padding: labels are of whole rows, which
    heads take from the first token, or are ignored where there is padding."""
    labels, mask = inputs.get("labels"), inputs.get("attention_mask")
    if not isinstance(labels, Tensor) or not gains_without_padding(labels):
        return False
    if mask is None or labels.shape != mask.shape:
        return True
    return bool((labels[mask == 0] == -100).all())


def heads_read_no_padding(model: PreTrainedModel) -> bool:
    """Tells whether a model's outputs are the same without padding: a head of transformers' own reads tokens that are
    none. A bare encoder hands on what it computes for padding too, and somebody's own head may read that."""
    return type(model).__module__.startswith("transformers.") and model.base_model is not model


@functools.cache
def ragged_encoder(own_forward: Forward) -> Forward:
    """Builds the forward pass of an encoder whose layers take ranges (`mlfs.ops.attention`) in place of the mask.

    No attention is computed to padding. Under `without_padding` nothing at all is computed for it, and zeros are put
    in its place at the end.
    """

    def forward(self: Any, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Any:
        kept = None
        if _may_take_ranges(self, hidden_states, kwargs):
            kept = _kept_tokens(hidden_states, attention_mask)
        if kept is None:
            return own_forward(self, hidden_states, attention_mask=attention_mask, **kwargs)
        if _packs.get() and bool(kept[:, 0].all()):  # else a head may read a first token that is padding
            return _run_packed(functools.partial(own_forward, self), hidden_states, kept, kwargs)
        ranges = _key_ranges(kept)
        mask = attention_mask if ranges is None else ranges
        return own_forward(self, hidden_states, attention_mask=mask, **kwargs)

    return forward


def _run_packed(run: Forward, hidden_states: Tensor, kept: Tensor, options: Mapping[str, Any]) -> Any:
    """Runs an encoder on the kept tokens of all rows, one after the other, and puts zeros where the others were."""
    index = kept.flatten().nonzero()[:, 0]
    packed = hidden_states.flatten(0, 1).index_select(0, index).unsqueeze(0)  # (1, kept tokens, hidden)
    ranges = ranges_of_sequences(kept.sum(1).cumsum(0).tolist())
    out = run(packed, attention_mask=ranges, **options)
    last = out.last_hidden_state[0]  # (kept tokens, hidden)
    whole = last.new_zeros(kept.numel(), last.shape[-1]).index_copy(0, index, last)
    out.last_hidden_state = whole.unflatten(0, kept.shape)  # (batch, tokens, hidden)
    return out


def _may_take_ranges(encoder: Any, hidden_states: Tensor, others: Mapping[str, Any]) -> bool:
    if not takes_ranges(hidden_states):  # first: it is False under torch.compile, which cannot trace a context variable
        return False
    packs = _packs.get()
    # others are the user's own; eager attention may be asked for its weights
    implementations = ("sdpa", "eager") if packs else ("sdpa",)
    return (
        (packs or not autocasts(hidden_states))  # into a type in which attention is computed range by range
        and encoder.config._attn_implementation in implementations
        and not encoder.config.is_decoder  # which attends to what is before
        and not any(others.get(name) is not None for name in ("encoder_hidden_states", "past_key_values"))
        and not isinstance(scope_of(encoder).sizes, RowSizes)
    )


def _kept_tokens(hidden_states: Tensor, mask: Tensor | None) -> Tensor | None:
    """Finds the tokens that count, (batch, tokens) bool, in a mask (batch, 1, any, tokens) that is the same for every
    query: True in a bool mask, 0 in one that is added.

    Returns None where the mask is not the same for every query, or weighs keys: adds a number that is neither 0 nor
    close to the lowest of its type.
    """
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
    """Makes the ranges of rows whose tokens (batch, tokens) count; None where a row has none that counts, or a gap."""
    keys = []
    for row in kept.tolist():
        if True not in row:
            return None
        first, last = row.index(True), len(row) - row[::-1].index(True)
        if last - first != sum(row):
            return None
        keys.append((first, last))
    return ranges_of_keys(keys, kept.shape[1])
