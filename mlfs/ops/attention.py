"""Attention within ranges, so that nothing is computed for padding:

    o_i = Σ_j dropout(softmax_j(scale · q_i · k_j)) v_j          over the keys j of the range that query i is in

Shapes: q and o (rows, tokens, heads, dim), k and v (rows, keys, heads / group, dim): each of their heads serves `group`
heads of q. `ranges` (any, 6) int64 on the CPU has a line for each range: (row, from, to, first, last, position): the
queries from ≤ i < to of a row attend to its keys first ≤ j < last, and where attention is causal, to those up to
position + i − from. Lines are sorted, and share neither queries nor keys. Queries in no range get zeros.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from mlfs.ops.autograd import refuse_second_gradients
from mlfs.ops.backend import autocast_type, backend_of, cpp, runs_as_operators
from mlfs.ops.observers import is_watched

__all__ = [
    "autocasts",
    "causal_attention",
    "gains_without_padding",
    "ragged_attention",
    "ragged_attention_reference",
    "ranges_of_keys",
    "ranges_of_sequences",
    "takes_ranges",
]


def takes_ranges(x: Tensor, *others: Tensor) -> bool:
    """Tells whether attention between such tensors is faster within ranges than under a mask.

    It is where the extension for CPUs computes it, and not where somebody traces or watches: ranges are read off the
    values of a mask.
    """
    return not torch.compiler.is_compiling() and not is_watched() and backend_of(x, *others) == "cpp"


def gains_without_padding(x: Tensor) -> bool:
    """Tells whether encoders gain by leaving the padding out, where x is: on CPUs, whose time is that of the tokens."""
    return x.device.type == "cpu"


def autocasts(x: Tensor) -> bool:
    """Tells whether autocast is on where x is: query, key and value that are made of x then have another type."""
    return autocast_type(x) is not None


def ranges_of_sequences(ends: Sequence[int]) -> Tensor:
    """Makes the ranges of sequences that lie one after the other in one row, each of which attends to itself.

    Args:
        ends: where each sequence ends, ascending.
    """
    starts = [0, *ends[:-1]]
    lines = [(0, start, end, start, end, start) for start, end in zip(starts, ends, strict=True)]
    return torch.tensor(lines, dtype=torch.long).view(-1, 6)


def ranges_of_keys(keys: Sequence[tuple[int, int]], tokens: int, past: int = 0) -> Tensor:
    """Makes the ranges of rows whose queries all attend to the same keys.

    Args:
        keys: of each row, the first key and the one after the last.
        tokens: how many queries a row has. past: how many keys came before the first query.
    """
    lines = [(row, 0, tokens, first, last, past) for row, (first, last) in enumerate(keys)]
    return torch.tensor(lines, dtype=torch.long).view(-1, 6)


def causal_attention(q: Tensor, k: Tensor, v: Tensor, scale: float, p: float = 0.0) -> Tensor:
    """Computes what transformers means by attention without a mask in a causal model, where `takes_ranges`.

    Of several queries the i-th attends to the keys 0 to i: there is no past, and keys beyond the queries, which a cache
    of a fixed length has, are not written yet. A single query attends to all keys.

    Args:
        q: (rows, heads, tokens, dim). k, v: (rows, heads / group, keys, dim), at least as many keys as tokens.
        scale: of the products of queries and keys. p: probability of dropout.

    Returns:
        (rows, tokens, heads, dim).
    """
    rows, tokens, keys = q.shape[0], q.shape[2], k.shape[2]
    ranges = ranges_of_keys([(0, keys if tokens == 1 else tokens)] * rows, tokens, past=keys - 1 if tokens == 1 else 0)
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return ragged_attention(q, k, v, ranges, scale, causal=True, p=p)


def ragged_attention_reference(
    q: Tensor, k: Tensor, v: Tensor, ranges: Tensor, scale: float, causal: bool = False, p: float = 0.0
) -> Tensor:
    """Computes the formula in plain, differentiable PyTorch, range after range; dropout from torch's generator."""
    out = torch.zeros_like(q)
    for row, start, end, first, last, position in ranges.tolist():
        parts = q[row, start:end], k[row, first:last], v[row, first:last]
        queries, keys, values = (t.transpose(0, 1) for t in parts)  # (heads, tokens, dim)
        seen = torch.ones(end - start, last - first, dtype=torch.bool, device=q.device)
        if causal:
            seen = seen.tril(position - first)
        o = scaled_dot_product_attention(
            queries, keys, values, seen, dropout_p=p, scale=scale, enable_gqa=queries.shape[0] != keys.shape[0]
        )
        o = o.masked_fill(~seen.any(1)[:, None], 0.0)  # of a query that sees no key
        out = out.index_put((torch.tensor(row), torch.arange(start, end)), o.transpose(0, 1))
    return out


def ragged_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    ranges: Tensor,
    scale: float,
    causal: bool = False,
    p: float = 0.0,
    seed: int | None = None,
) -> Tensor:
    """Computes the formula above.

    Args:
        q, k, v: floating point, any strides.
        p: probability of dropout. The mask is drawn from `seed` and drawn again in the backward pass.
        seed: by default drawn from torch's generator.

    Raises:
        RuntimeError: shapes that do not fit, or ranges outside of them (from the extension).
    """
    if not runs_as_operators() or backend_of(q, k, v) != "cpp":
        return ragged_attention_reference(q, k, v, ranges, scale, causal, p)
    if p and seed is None:
        seed = int(torch.randint(2**62, ()))
    options = ranges, scale, causal, p, seed or 0
    if not torch.is_grad_enabled() and not torch.compiler.is_compiling() and not is_watched():
        return _by_extension(q, k, v, *options)[0]
    return _ragged_attention(q, k, v, *options)[0]


@torch.library.custom_op("mlfs::ragged_attention", mutates_args=())
def _ragged_attention(
    q: Tensor, k: Tensor, v: Tensor, ranges: Tensor, scale: float, causal: bool, p: float, seed: int
) -> tuple[Tensor, Tensor]:
    """Returns (o, the log of each query's sum of exponentials (rows, tokens, heads))."""
    return _by_extension(q, k, v, ranges, scale, causal, p, seed)


def _by_extension(
    q: Tensor, k: Tensor, v: Tensor, ranges: Tensor, scale: float, causal: bool, p: float, seed: int
) -> tuple[Tensor, Tensor]:
    return cpp().attention(q, k, v, ranges, causal, scale, p, seed)


@_ragged_attention.register_fake
def _(q, k, v, ranges, scale, causal, p, seed):
    return torch.empty_like(q, memory_format=torch.contiguous_format), q.new_empty(q.shape[:3])


@torch.library.custom_op("mlfs::ragged_attention_backward", mutates_args=())
def _ragged_attention_backward(
    d_o: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, ranges: Tensor, scale: float, causal: bool,
    p: float, seed: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    dq, dk, dv = cpp().attention_backward(d_o, q, k, v, o, lse, ranges, causal, scale, p, seed)
    return dq, dk, dv


@_ragged_attention_backward.register_fake
def _(d_o, q, k, v, o, lse, ranges, scale, causal, p, seed):
    return tuple(torch.empty_like(t, memory_format=torch.contiguous_format) for t in (q, k, v))


def _setup_context(ctx, inputs, output) -> None:
    q, k, v, ranges, *ctx.options = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, *output, ranges)


def _backward(ctx, d_o, _):
    nothing = (None,) * 5
    if d_o is None:
        return (None, None, None, *nothing)
    refuse_second_gradients()
    return (*_ragged_attention_backward(d_o, *ctx.saved_tensors, *ctx.options), *nothing)


_ragged_attention.register_autograd(_backward, setup_context=_setup_context)
