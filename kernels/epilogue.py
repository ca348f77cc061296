"""Activations that kernels apply to a product while it is still in registers."""

import triton
import triton.language as tl


@triton.jit
def apply_activation(z, other, ACTIVATION: tl.constexpr):
    """act(z) in fp32: GELU (erf or tanh form, arXiv 1606.08415), or SiLU(z) · other (gated pairs, arXiv 2002.05202)."""
    if ACTIVATION == "gelu":
        z = 0.5 * z * (1.0 + tl.erf(z * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":
        z = z * tl.sigmoid(1.5957691216057308 * (z + 0.044715 * z * z * z))  # 0.5 (1 + tanh u) = sigmoid(2 u)
    elif ACTIVATION == "silu_mul":
        z = z * tl.sigmoid(z) * other
    return z


@triton.jit
def activation_slope(z, ACTIVATION: tl.constexpr):
    """d act(z) / dz in fp32, for `other` = 1."""
    slope = z * 0.0 + 1.0
    if ACTIVATION == "gelu":
        slope = 0.5 * (1.0 + tl.erf(z * 0.7071067811865476)) + z * 0.3989422804014327 * tl.exp(-0.5 * z * z)
    elif ACTIVATION == "gelu_tanh":
        s = tl.sigmoid(1.5957691216057308 * (z + 0.044715 * z * z * z))
        slope = s + z * s * (1.0 - s) * 1.5957691216057308 * (1.0 + 0.134145 * z * z)
    elif ACTIVATION == "silu_mul":
        s = tl.sigmoid(z)
        slope = s * (1.0 + z * (1.0 - s))
    return slope


@triton.jit
def activation_gradient(d, z, other, ACTIVATION: tl.constexpr):
    """(dz, d_other) in fp32 from the gradient d of act(z); d_other is for gated pairs."""
    gate = d
    if ACTIVATION == "silu_mul":
        gate = d * z * tl.sigmoid(z)
        d *= other
    return d * activation_slope(z, ACTIVATION), gate


@triton.jit
def activation_backward_kernel(
    dy, pre, operand, dz, d_operand, rows, columns, dy_t, pre_t, operand_t,
    ACTIVATION: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dz = dy · act'(pre) (· operand); d_operand = dy · SiLU(pre). One row a program; dz, d_operand contiguous."""
    row = tl.program_id(0).to(tl.int64)
    for start in range(0, columns, BLOCK):
        c = start + tl.arange(0, BLOCK)
        mask = c < columns
        d = tl.load(dy + row * dy_t + c, mask=mask, other=0.0).to(tl.float32)
        z = tl.load(pre + row * pre_t + c, mask=mask, other=0.0).to(tl.float32)
        other = z
        if ACTIVATION == "silu_mul":
            other = tl.load(operand + row * operand_t + c, mask=mask, other=0.0).to(tl.float32)
        d, gate = activation_gradient(d, z, other, ACTIVATION)
        if ACTIVATION == "silu_mul":
            tl.store(d_operand + row * columns + c, gate.to(d_operand.dtype.element_ty), mask=mask)
        tl.store(dz + row * columns + c, d.to(dz.dtype.element_ty), mask=mask)
