"""Rotary position embeddings (Su et al., arXiv 2104.09864) of queries and keys, by halves as in the Llama family:

    q' = q · cos + turn(q) · sin,   k' = k · cos + turn(k) · sin,   turn([a, b]) = [−b, a]

Shapes: q and q' (batch, tokens, heads, dim), k and k' (batch, tokens, kv_heads, dim), cos and sin (batch or 1, tokens,
dim). The halves a and b are those of dim. What comes before, a projection, and after, attention, gives and takes them
so: no copy with heads first is made.

The reference rounds each product and their sum to the wider of the types of q and cos, as transformers does. Kernels
compute in fp32 and round once, under autocast to its type, which is what attention would round them to.
"""

import torch
from torch import Tensor

from mlfs.errors import MLFSError
from mlfs.ops.backend import autocast_type, backend_of, cpp

__all__ = ["rotary", "rotary_reference"]


def rotary_reference(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """The formula in plain, differentiable PyTorch."""
    cos, sin = cos.unsqueeze(2), sin.unsqueeze(2)
    return q * cos + _turn(q) * sin, k * cos + _turn(k) * sin


def rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """(q', k') of the formula above; cos and sin get no gradient where kernels run.

    Args:
        q, k: (batch, tokens, heads, dim) and (batch, tokens, kv_heads, dim) of one type, any strides, dim even.
        cos, sin: (batch or 1, tokens, dim), any strides.

    Raises:
        MLFSError: shapes that do not fit each other, or q and k of different types.
    """
    rows, heads = (q.shape[0], *q.shape[1:2], q.shape[-1]), (q.dim(), k.dim())
    fits = heads == (4, 4) and (k.shape[0], k.shape[1], k.shape[3]) == rows and rows[2] % 2 == 0
    if not (fits and cos.shape == sin.shape and cos.shape in (rows, (1, *rows[1:]))) or q.dtype != k.dtype:
        raise MLFSError(
            f"q {_shown(q)}, k {_shown(k)}, cos {_shown(cos)}, sin {_shown(sin)}: expected q and k (batch, tokens, "
            "heads, dim) of one type and an even dim, cos and sin (batch or 1, tokens, dim)"
        )
    backend = backend_of(q, k, cos, sin)
    if backend == "reference":
        return rotary_reference(q, k, cos, sin)
    if backend == "cpp" and not torch.is_grad_enabled() and not torch.compiler.is_compiling():
        return cpp().rotary(q, k, cos, sin, False)
    return _rotary(q, k, cos, sin, autocast_type(q) or torch.promote_types(q.dtype, cos.dtype), False)


def _turn(x: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return torch.cat((-b, a), -1)


def _shown(t: Tensor) -> str:
    return f"{tuple(t.shape)} {str(t.dtype)[6:]}"


@torch.library.custom_op("mlfs::rotary", mutates_args=())
def _rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, kind: torch.dtype, backward: bool) -> tuple[Tensor, Tensor]:
    """(q', k') of type `kind`, contiguous. backward: by the transposed rotation, which takes gradients back."""
    backend = backend_of(q, k, cos, sin)
    if backend == "triton":
        from mlfs.kernels import rotary as kernels

        return kernels.rotary(q, k, cos, sin, kind, backward)
    if backend == "cpp":
        return cpp().rotary(q, k, cos, sin, backward)
    if backward:
        sin = -sin.roll(sin.shape[-1] // 2, -1)
    one, two = rotary_reference(q, k, cos, sin)
    return one.to(kind).contiguous(), two.to(kind).contiguous()


@_rotary.register_fake
def _(q, k, cos, sin, kind, backward):
    return q.new_empty(q.shape, dtype=kind), k.new_empty(k.shape, dtype=kind)


def _setup_context(ctx, inputs, output) -> None:
    q, _, cos, sin, _, ctx.was_backward = inputs
    ctx.kind = q.dtype
    ctx.save_for_backward(cos, sin)


def _backward(ctx, dq, dk):
    return *_rotary(dq, dk, *ctx.saved_tensors, ctx.kind, not ctx.was_backward), None, None, None, None


_rotary.register_autograd(_backward, setup_context=_setup_context)
