"""Rotary position embeddings (formula: `mlfs.ops.rotary`) of queries and keys in one launch, read through any strides.

A program turns one token's heads: of the query, or of the key. Everything is computed in fp32 and rounded once.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mlfs.kernels.arguments import with_rows


@triton.jit
def _turn(
    x, y, cos, sin, place, head, heads, x_h, half,
    BACKWARD: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Heads from `head` on of the token at x, its angles at cos and sin, to `place` in y (contiguous heads)."""
    h, d = head + tl.arange(0, BLOCK_H), tl.arange(0, BLOCK_D)
    inside = d < half
    mask = (h < heads)[:, None] & inside[None, :]
    cos1 = tl.load(cos + d, mask=inside, other=0.0).to(tl.float32)[None, :]
    cos2 = tl.load(cos + half + d, mask=inside, other=0.0).to(tl.float32)[None, :]
    sin1 = tl.load(sin + d, mask=inside, other=0.0).to(tl.float32)[None, :]
    sin2 = tl.load(sin + half + d, mask=inside, other=0.0).to(tl.float32)[None, :]
    if BACKWARD:  # the transposed rotation
        sin1, sin2 = -sin2, -sin1
    h64 = h.to(tl.int64)[:, None]
    xs, ys = x + h64 * x_h + d[None, :], y + (place * heads + h64) * 2 * half + d[None, :]
    x1 = tl.load(xs, mask=mask, other=0.0).to(tl.float32)
    x2 = tl.load(xs + half, mask=mask, other=0.0).to(tl.float32)
    tl.store(ys, (x1 * cos1 - x2 * sin1).to(y.dtype.element_ty), mask=mask)
    tl.store(ys + half, (x2 * cos2 + x1 * sin2).to(y.dtype.element_ty), mask=mask)


@triton.jit
def _rotary(
    q, k, cos, sin, q_out, k_out, tokens, q_heads, k_heads, half, q_b, q_t, q_h, k_b, k_t, k_h, cos_b, cos_t,
    sin_b, sin_t, BACKWARD: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Some heads of one token: of q, or, in the tiles after those, of k."""
    place, tile = tl.program_id(0).to(tl.int64), tl.program_id(1)
    b, t = place // tokens, place % tokens
    cos += b * cos_b + t * cos_t
    sin += b * sin_b + t * sin_t
    tiles = tl.cdiv(q_heads, BLOCK_H)
    if tile < tiles:
        x = q + b * q_b + t * q_t
        _turn(x, q_out, cos, sin, place, tile * BLOCK_H, q_heads, q_h, half, BACKWARD, BLOCK_H, BLOCK_D)
    else:
        x = k + b * k_b + t * k_t
        _turn(x, k_out, cos, sin, place, (tile - tiles) * BLOCK_H, k_heads, k_h, half, BACKWARD, BLOCK_H, BLOCK_D)


# ---- launchers ------------------------------------------------------------------------------------------------------


def rotary(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, dtype: torch.dtype, backward: bool = False
) -> tuple[Tensor, Tensor]:
    """Turns queries and keys by the angles of their positions.

    Args:
        q, k: (B, T, H, D) and (B, T, G, D), any strides.
        cos, sin: (B or 1, T, D).
        backward: turn back instead: makes the gradients of q and k from those of the turned ones.

    Returns:
        Both, contiguous and of type `dtype`.
    """
    batch, tokens, heads, dim = q.shape
    q, k, cos, sin = with_rows(q), with_rows(k), with_rows(cos), with_rows(sin)
    out = tuple(t.new_empty(t.shape, dtype=dtype) for t in (q, k))
    most = max(heads, k.shape[2])
    if batch * tokens * most * dim:
        block_h, block_d = min(32, triton.next_power_of_2(most)), triton.next_power_of_2(dim // 2)
        tiles = triton.cdiv(heads, block_h) + triton.cdiv(k.shape[2], block_h)
        (q_b, q_t, q_h, _), (k_b, k_t, k_h, _) = q.stride(), k.stride()
        (cos_b, cos_t), (sin_b, sin_t) = _steps(cos), _steps(sin)
        _rotary[(batch * tokens, tiles)](
            q, k, cos, sin, *out, tokens=tokens, q_heads=heads, k_heads=k.shape[2], half=dim // 2,
            q_b=q_b, q_t=q_t, q_h=q_h, k_b=k_b, k_t=k_t, k_h=k_h, cos_b=cos_b, cos_t=cos_t, sin_b=sin_b, sin_t=sin_t,
            BACKWARD=backward, BLOCK_H=block_h, BLOCK_D=block_d, num_warps=max(1, min(4, block_h * block_d // 256)),
        )  # fmt: skip
    return out[0], out[1]


def _steps(t: Tensor) -> tuple[int, int]:
    """Returns the strides from one row of the batch, and one token, to the next; one row is for all."""
    return t.stride(0) if t.shape[0] > 1 else 0, t.stride(1)
