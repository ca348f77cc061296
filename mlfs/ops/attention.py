"""Attention within sequences that lie one after the other, without padding:

    o_i = Σ_j dropout(softmax_j(scale · q_i · k_j)) v_j          over the tokens j of the sequence that i is in

Shapes: q, k, v and o (tokens, heads, dim); `offsets` (sequences + 1,) int64 on the CPU: where each sequence starts, and
the end. Attention is both ways (no causal mask), as in encoders.
"""

from itertools import pairwise

import torch
from torch import Tensor

from mlfs.ops.backend import backend_of, cpp

__all__ = ["packed_attention", "packed_attention_reference"]


def packed_attention_reference(
    q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, scale: float, p: float = 0.0
) -> Tensor:
    """The formula in plain, differentiable PyTorch, one sequence after the other; dropout from torch's generator."""
    ends = offsets.tolist()
    parts = []
    for a, b in pairwise(ends):
        one, two, three = (t[a:b].transpose(0, 1) for t in (q, k, v))
        o = torch.nn.functional.scaled_dot_product_attention(one, two, three, dropout_p=p, scale=scale)
        parts.append(o.transpose(0, 1))
    return torch.cat(parts) if parts else torch.zeros_like(q)


def packed_attention(
    q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, scale: float, p: float = 0.0, seed: int | None = None
) -> Tensor:
    """The formula above.

    Args:
        q, k, v: (tokens, heads, dim), floating point.
        p: probability of dropout. The mask is drawn from `seed` and drawn again in the backward pass.
        seed: by default drawn from torch's generator.
    """
    if backend_of(q, k, v) != "cpp":
        return packed_attention_reference(q, k, v, offsets, scale, p)
    if p and seed is None:
        seed = int(torch.randint(2**62, ()))
    return _packed_attention(q, k, v, offsets, scale, p, seed or 0)[0]


@torch.library.custom_op("mlfs::packed_attention", mutates_args=())
def _packed_attention(
    q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, scale: float, p: float, seed: int
) -> tuple[Tensor, Tensor]:
    """(o, the log of each row's sum of exponentials (tokens, heads))."""
    return cpp().attention(q, k, v, offsets, scale, p, seed)


@_packed_attention.register_fake
def _(q, k, v, offsets, scale, p, seed):
    return torch.empty_like(q, memory_format=torch.contiguous_format), q.new_empty(q.shape[:2])


@torch.library.custom_op("mlfs::packed_attention_backward", mutates_args=())
def _packed_attention_backward(
    d_o: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, offsets: Tensor, scale: float, p: float,
    seed: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    dq, dk, dv = cpp().attention_backward(d_o, q, k, v, o, lse, offsets, scale, p, seed)
    return dq, dk, dv


@_packed_attention_backward.register_fake
def _(d_o, q, k, v, o, lse, offsets, scale, p, seed):
    return tuple(torch.empty_like(t, memory_format=torch.contiguous_format) for t in (q, k, v))


def _setup_context(ctx, inputs, output) -> None:
    q, k, v, offsets, *ctx.options = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, *output, offsets)


def _backward(ctx, d_o, _):
    nothing = (None,) * 4
    if d_o is None:
        return (None, None, None, *nothing)
    return (*_packed_attention_backward(d_o, *ctx.saved_tensors, *ctx.options), *nothing)


_packed_attention.register_autograd(_backward, setup_context=_setup_context)
