"""Key-value caches of transformers, under sizes that change: what each layer's part of a cache holds."""

from collections.abc import Iterable
from typing import Any

from torch import Tensor
from transformers import Cache

from mlfs.errors import MLFSError


def fit_caches(values: Iterable[Any], layer: int, heads: int, head_dim: int) -> None:
    """Readies the caches among `values` for a layer's keys and values.

    A cache may have been allocated for the full model, as `generate` with `prefill_chunk_size` does: while nothing is
    in it, it is allocated anew.

    Args:
        values: the arguments of the layer.
        heads, head_dim: what its keys and values have.

    Raises:
        MLFSError: the layer's part of a cache holds keys of another size.
    """
    for cache in values:
        if not isinstance(cache, Cache) or layer >= len(cache.layers):
            continue
        part: Any = cache.layers[layer]
        keys = getattr(part, "keys", None)
        if not part.is_initialized or keys is None or keys.dim() != 4:
            continue
        if (keys.shape[1], keys.shape[3]) == (heads, head_dim):
            continue
        if int(part.get_seq_length()):
            raise MLFSError(
                f"the cache holds keys of another size (layer {layer}: {_size(keys)}, the active subnet has {heads} "
                f"heads of {head_dim}): go on with the size that wrote it, or take a new cache"
            )
        part.is_initialized = False  # so that it is allocated at its next update


def keep_caches_in_step(values: Iterable[Any], hidden_states: Tensor, layer: int) -> None:
    """Adds one number per token to the part of a skipped layer in a cache, which tells lengths by any layer.

    Args:
        values: the arguments of the layer. hidden_states: (batch, tokens, hidden).
    """
    for cache in values:
        if isinstance(cache, Cache):
            fit_caches([cache], layer, 1, 1)
            token = hidden_states[..., :1].detach().unsqueeze(1)  # (batch, 1, tokens, 1)
            cache.update(token, token, layer)


def _size(keys: Tensor) -> str:
    heads, head_dim = keys.shape[1], keys.shape[3]
    return "left out" if (heads, head_dim) == (1, 1) else f"{heads} heads of {head_dim}"
