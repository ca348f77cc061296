"""Rotary position embeddings (Su et al., arXiv 2104.09864) of queries and keys, by halves as in the Llama family:

    q' = q · cos + turn(q) · sin,   k' = k · cos + turn(k) · sin,   turn([a, b]) = [−b, a]

Shapes: q and q' (batch, tokens, heads, dim), k and k' (batch, tokens, kv_heads, dim), cos and sin (batch or 1, tokens,
dim). The halves a and b are those of dim. What comes before, a projection, and after, attention, gives and takes them
so: no copy with heads first is made.

The reference rounds each product and their sum to the wider of the types of q and cos, as transformers does. Kernels
compute in fp32 and round once, under autocast to its type, which is what attention would round them to.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mlfs.errors import MLFSError
from mlfs.ops.autograd import differentiable
from mlfs.ops.backend import autocast_type, direct_implementation, has_implementation, run
from mlfs.ops.backends.table import implements

__all__ = ["rotary", "rotary_reference"]


def rotary_reference(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Computes the formula in plain, differentiable PyTorch."""
    cos, sin = cos.unsqueeze(2), sin.unsqueeze(2)  # (batch or 1, tokens, 1, dim): the same for every head
    return q * cos + _turn(q) * sin, k * cos + _turn(k) * sin


def rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Computes (q', k') of the formula above; cos and sin get no gradient where kernels run.

    Args:
        q, k: (batch, tokens, heads, dim) and (batch, tokens, kv_heads, dim) of one type, any strides, dim even.
        cos, sin: (batch or 1, tokens, dim), any strides.

    Raises:
        MLFSError: shapes that do not fit each other, or q and k of different types.
    """
    if not _fit(q, k, cos, sin):
        raise MLFSError(
            f"q {_shown(q)}, k {_shown(k)}, cos {_shown(cos)}, sin {_shown(sin)}: expected q and k (batch, tokens, "
            "heads, dim) of one type and an even dim, cos and sin (batch or 1, tokens, dim)"
        )
    direct = direct_implementation("direct_rotary", q, k, cos, sin)
    if direct is not None:
        return direct(q, k, cos, sin)
    if not has_implementation("rotary", q, k, cos, sin):
        return rotary_reference(q, k, cos, sin)
    # What the kernels round to once.
    dtype = autocast_type(q) or torch.promote_types(q.dtype, cos.dtype)
    return _rotary(q, k, cos, sin, dtype, False)


def _fit(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> bool:
    if q.dim() != 4 or k.dim() != 4 or q.dtype != k.dtype:
        return False
    batch, tokens, _, dim = q.shape
    of_keys = k.shape[0] == batch and k.shape[1] == tokens and k.shape[3] == dim
    of_angles = cos.shape == sin.shape and cos.shape in ((batch, tokens, dim), (1, tokens, dim))
    return of_keys and of_angles and dim % 2 == 0


def _turn(x: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)  # (..., dim / 2) each
    return torch.cat((-second, first), -1)


def _shown(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"


@implements("reference", "rotary")
def _rotary_in_pytorch(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, dtype: torch.dtype, backward: bool
) -> tuple[Tensor, Tensor]:
    """Computes (q', k') of `dtype`, contiguous; `backward` by the transposed rotation, which takes gradients back."""
    if backward:  # turned by the same angle back: sin of the other half, with the other sign
        sin = -sin.roll(sin.shape[-1] // 2, -1)
    turned_q, turned_k = rotary_reference(q, k, cos, sin)
    return turned_q.to(dtype).contiguous(), turned_k.to(dtype).contiguous()


@torch.library.custom_op("mlfs::rotary", mutates_args=())
def _rotary(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, dtype: torch.dtype, backward: bool
) -> tuple[Tensor, Tensor]:
    """(q', k'): see `_rotary_in_pytorch`."""
    return run("rotary", (q, k, cos, sin), q, k, cos, sin, dtype, backward)


@_rotary.register_fake
def _(q, k, cos, sin, dtype, backward):
    return q.new_empty(q.shape, dtype=dtype), k.new_empty(k.shape, dtype=dtype)


def _keep(ctx: Any, inputs: Sequence[Any], output: Sequence[Tensor]) -> None:
    q, _, cos, sin, _, ctx.was_backward = inputs
    ctx.dtype = q.dtype
    ctx.save_for_backward(cos, sin)


def _gradients(ctx: Any, of_outputs: Sequence[Tensor | None], of_input: None) -> tuple[Any, ...]:
    dq, dk = _rotary(*of_outputs, *ctx.saved_tensors, ctx.dtype, not ctx.was_backward)
    return dq, dk, None, None, None, None


differentiable(_rotary, _keep, _gradients, results=lambda inputs: 2, twice=True)  # the gradient is the operator again
