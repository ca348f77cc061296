"""Encoders that compute nothing for padding."""

import functools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from mlfs.models.fused.mlp import Forward
from mlfs.ops.attention import ranges_of_keys, ranges_of_sequences
from mlfs.ops.backend import autocast_type, backend_of
from mlfs.space.dimensions import RowSizes

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
