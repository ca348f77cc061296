"""Linear layer read through a slice, with low-rank stages:

    z = x · W[rows, :n]ᵀ + b[rows] + Σ_s c_s · (x · A_s[:, :n]ᵀ) · B_s[rows, :]ᵀ
    y = act(z) + residual

Shapes: x (..., n), W (M, N) with any strides, b (M,), A_s (r_s, N), B_s (M, r_s), y (..., m); n ≤ N and m = Σ lengths.
act is nothing, GELU (erf or tanh form, arXiv 1606.08415) or, for the first of a gated pair, SiLU(z) · operand
(arXiv 2002.05202); operand and residual are (..., m).
`rows` are spans of W's rows, a flat list (start, length, start, length, ...): one span for a plain projection, one per
part for a fused one. W is read in place. It is frozen: the backward pass makes dx, and dA_s, dB_s for the stages that
ask for them, and no gradient of W or b.

Proposition 1 of "Efficiently Distilling LLMs for Edge Applications" (arXiv 2404.01353) is the identity behind it.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import gelu, silu

from mlfs.errors import MLFSError
from mlfs.ops.backend import backend_of, cpp, in_autocast_type
from mlfs.ops.layer import Epilogue, LowRankLinear, Wanted

ACTIVATIONS = ("none", "gelu", "gelu_tanh", "silu_mul")

__all__ = ["sliced_linear", "sliced_linear_reference"]


# (weight, bias, lora_a, lora_b, scales, spans)
Layer = tuple[Tensor, Tensor | None, list[Tensor], list[Tensor], list[float], list[int]]


def sliced_linear_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Sequence[Tensor],
    lora_b: Sequence[Tensor],
    scales: Sequence[float],
    spans: Sequence[int],
    activation: str = "none",
    operand: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """The formula in plain, differentiable PyTorch (also in W and b: task heads train through it)."""
    n = x.shape[-1]
    parts = []
    for rows in _slices(spans):
        b = None if bias is None else bias[rows].to(x.dtype)
        parts.append(torch.nn.functional.linear(x, weight[rows, :n].to(x.dtype), b))
    y = parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)
    for a, b, c in zip(lora_a, lora_b, scales, strict=True):
        h = torch.nn.functional.linear(x, a[:, :n].to(x.dtype))
        y = y + torch.nn.functional.linear(h, _rows(b, spans).to(x.dtype)) * c
    return finish(y, activation, operand, residual)


def sliced_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Sequence[Tensor],
    lora_b: Sequence[Tensor],
    scales: Sequence[float],
    spans: Sequence[int],
    activation: str = "none",
    operand: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """The formula above, with W and b frozen.

    Args:
        x: (..., n), floating point. Under autocast it is cast to the autocast type; the result has its type.
        weight: (M, N), any strides, any floating type; never written, never copied when it has x's type.
        bias: (M,) or None.
        lora_a, lora_b, scales: per stage (r_s, N), (M, r_s) and a float; may be empty.
        spans: flat (start, length) pairs of rows.
        activation: "none", "gelu", "gelu_tanh" or "silu_mul"; the last one takes `operand` (..., m).
        residual: (..., m), added last.

    Returns:
        (..., m) of x's type; with a residual, of the wider of theirs.

    Raises:
        MLFSError: an unknown activation, or an operand where none belongs or none where one does.
    """
    _check_activation(activation, operand)
    x, operand = in_autocast_type(x), None if operand is None else in_autocast_type(operand)
    leaves = (x, operand, residual, *lora_a, *lora_b)
    keep = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in leaves)
    lists = (list(lora_a), list(lora_b), list(scales), list(spans))
    return _sliced_linear(x, weight, bias, *lists, activation, operand, residual, keep)[0]


def _check_activation(activation: str, operand: Tensor | None) -> None:
    if activation not in ACTIVATIONS or (operand is not None) != (activation == "silu_mul"):
        raise MLFSError(
            f"activation={activation!r} {'with' if operand is not None else 'without'} an operand: expected one of "
            f"{', '.join(ACTIVATIONS)}; only silu_mul takes an operand, and needs it"
        )


def direct_linears(
    x: Tensor,
    layers: list[Layer],
    activation: str = "none",
    operand: Tensor | None = None,
    residual: Tensor | None = None,
) -> list[Tensor]:
    """`sliced_linear` of each layer where `is_direct`: by the extension for CPUs, in one call.

    Args:
        layers: as `sliced_linear` takes each.
        activation, operand, residual: with one layer only.
    """
    _check_activation(activation, operand)
    return cpp().linear(x, layers, ACTIVATIONS.index(activation), operand, residual)


def finish(z: Tensor, activation: str, operand: Tensor | None, residual: Tensor | None) -> Tensor:
    """act(z) + residual."""
    if operand is not None:
        z = silu(z) * operand
    elif activation != "none":
        z = gelu(z, approximate="tanh" if activation == "gelu_tanh" else "none")
    return z if residual is None else z + residual


def _activation_backward(
    dy: Tensor, z: Tensor, activation: str, operand: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """(dz, d_operand) of y = act(z)."""
    if operand is not None:
        return torch.ops.aten.silu_backward(dy * operand, z), dy * silu(z)
    return torch.ops.aten.gelu_backward(dy, z, approximate="tanh" if activation == "gelu_tanh" else "none"), None


def _slices(spans: Sequence[int]) -> list[slice]:
    return [slice(start, start + length) for start, length in zip(spans[::2], spans[1::2], strict=True)]


def _rows(t: Tensor, spans: Sequence[int]) -> Tensor:
    rows = _slices(spans)
    return t[rows[0]] if len(rows) == 1 else torch.cat([t[r] for r in rows])


@torch.library.custom_op("mlfs::sliced_linear", mutates_args=())
def _sliced_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: list[Tensor],
    lora_b: list[Tensor],
    scales: list[float],
    spans: list[int],
    activation: str,
    operand: Tensor | None,
    residual: Tensor | None,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(y, h, z): h (T, Σ r_s) are the stages' c_s · x A_sᵀ side by side, z (T, m) is what went into act.

    Both are for the backward pass: without `keep` they are empty, and z is where act does nothing.
    """
    n, m = x.shape[-1], sum(spans[1::2])
    flat = x.reshape(-1, n)
    other, added = _flat(operand, m), _flat(residual, m)
    backend = backend_of(x, weight, bias, *lora_a, *lora_b, operand, residual)
    if backend == "triton":
        from mlfs.kernels import decode, product

        layer = LowRankLinear(weight, bias, lora_a, lora_b, scales, spans)
        epilogue = Epilogue(activation, other, added)
        if not keep and flat.shape[0] <= decode.MAX_TOKENS:
            y, h, z = decode.forward(flat, layer, epilogue), x.new_empty(0), x.new_empty(0)
        else:
            y, h, z = product.forward(flat, layer, epilogue, keep_pre=keep and activation != "none")
        return y.view(*x.shape[:-1], m), h if keep else x.new_empty(0), z
    if backend == "cpp":
        layers = [(weight, bias, lora_a, lora_b, scales, spans)]
        ((y, h, z),) = cpp().linear_forward(flat, layers, ACTIVATIONS.index(activation), other, added, keep)
        return y.view(*x.shape[:-1], m), h if keep else x.new_empty(0), z
    out = x.new_empty(flat.shape[0], m)
    column = 0
    for rows in _slices(spans):
        part = out[:, column : column + rows.stop - rows.start]
        w = weight[rows, :n].to(x.dtype).t()
        if bias is None:
            torch.mm(flat, w, out=part) if part.is_contiguous() else part.copy_(flat @ w)
        else:
            b = bias[rows].to(x.dtype)
            torch.addmm(b, flat, w, out=part) if part.is_contiguous() else part.copy_(torch.addmm(b, flat, w))
        column += rows.stop - rows.start
    h = x.new_empty(flat.shape[0], sum(a.shape[0] for a in lora_a))
    for a, b, c, mine in zip(lora_a, lora_b, scales, h.split([a.shape[0] for a in lora_a], 1), strict=True):
        mine.copy_(flat @ a[:, :n].to(x.dtype).t()).mul_(c)
        out.addmm_(mine, _rows(b, spans).to(x.dtype).t())
    z = out if keep and activation != "none" else out.new_empty(0)
    y = finish(out, activation, other, added)
    return y.view(*x.shape[:-1], m), h if keep else h.new_empty(0), z


@_sliced_linear.register_fake
def _(x, weight, bias, lora_a, lora_b, scales, spans, activation, operand, residual, keep):
    m, tokens = sum(spans[1::2]), x.shape[:-1].numel()
    h = x.new_empty((tokens, sum(a.shape[0] for a in lora_a)) if keep else 0)
    kind = x.dtype if residual is None else torch.result_type(x, residual)
    y = x.new_empty(*x.shape[:-1], m, dtype=kind)
    return y, h, x.new_empty((tokens, m) if keep and activation != "none" else 0)


@torch.library.custom_op("mlfs::sliced_linear_backward", mutates_args=())
def _sliced_linear_backward(
    dy: Tensor,
    x: Tensor | None,
    h: Tensor | None,
    weight: Tensor,
    lora_a: list[Tensor],
    lora_b: list[Tensor],
    scales: list[float],
    spans: list[int],
    trains: list[bool],
    needs_dx: bool,
    weight_columns: int,
    activation: str,
    z: Tensor | None,
    operand: Tensor | None,
) -> list[Tensor]:
    """[dx (empty unless needed), d_operand (empty unless there is one), dA_s and dB_s of each stage s that trains]; the
    gradients are zero off the slice."""
    n, m = weight_columns, dy.shape[-1]
    grad = dy.reshape(-1, m)
    flat = x.reshape(-1, n) if x is not None else None
    other, d_other = _flat(operand, m), None
    backend = backend_of(dy, weight, *lora_a, *lora_b, z, operand)
    if backend == "triton":
        from mlfs.kernels import product

        if z is not None:
            grad, d_other = product.activation_backward(grad, z, other, activation)
        layer = LowRankLinear(weight, None, lora_a, lora_b, scales, spans)
        dx, gradients = product.backward(grad, flat, h, layer, Wanted(trains, needs_dx, n))
    elif backend == "cpp":
        if z is not None:
            grad, d_other = cpp().activation_backward(grad, z, other, ACTIVATIONS.index(activation))
            d_other = d_other if other is not None else None
        layers = [(weight, None, lora_a, lora_b, scales, spans)]
        dx, (gradients,) = cpp().linear_backward([grad], flat, [h], layers, [trains], needs_dx, n)
    else:
        if z is not None:
            grad, d_other = _activation_backward(grad, z, activation, other)
        dx, *gradients = linear_backward(grad, flat, h, weight, lora_a, lora_b, scales, spans, trains, needs_dx, n)
    dx = dx.view(*dy.shape[:-1], n) if needs_dx else dx
    return [dx, dy.new_empty((0, m)) if d_other is None else d_other.view(dy.shape), *gradients]


def linear_backward(
    grad: Tensor,
    x: Tensor | None,
    h: Tensor | None,
    weight: Tensor,
    lora_a: list[Tensor],
    lora_b: list[Tensor],
    scales: list[float],
    spans: list[int],
    trains: list[bool],
    needs_dx: bool,
    n: int,
) -> list[Tensor]:
    """Gradients of the linear part in plain PyTorch, on 2-d tensors: [dx, dA_s, dB_s, ...]."""
    dx = grad.new_empty((0, n))
    gradients = []
    if needs_dx:
        column, dx = 0, grad.new_empty((grad.shape[0], n))
        for i, rows in enumerate(_slices(spans)):
            part = grad[:, column : (column := column + rows.stop - rows.start)]
            torch.addmm(dx, part, weight[rows, :n].to(grad.dtype), beta=float(i > 0), out=dx)
    offset = 0
    for a, b, c, train in zip(lora_a, lora_b, scales, trains, strict=True):
        mine = slice(offset, offset := offset + a.shape[0])
        if not (train or needs_dx):
            continue
        g = (grad @ _rows(b, spans).to(grad.dtype)).mul_(c)
        if needs_dx:
            dx.addmm_(g, a[:, :n].to(grad.dtype))
        if train:
            assert x is not None and h is not None
            da, db = torch.zeros_like(a), torch.zeros_like(b)
            da[:, :n] = g.t() @ x
            db_rows, column = grad.t() @ h[:, mine], 0
            for rows in _slices(spans):
                db[rows] = db_rows[column : (column := column + rows.stop - rows.start)]
            gradients += [da, db]
    return [dx, *gradients]


@_sliced_linear_backward.register_fake
def _(dy, x, h, weight, lora_a, lora_b, scales, spans, trains, needs_dx, weight_columns, activation, z, operand):
    dx = dy.new_empty((*dy.shape[:-1], weight_columns) if needs_dx else (0, weight_columns))
    d_operand = dy.new_empty((0, dy.shape[-1]) if operand is None else dy.shape)
    stages = [(a, b) for a, b, train in zip(lora_a, lora_b, trains, strict=True) if train]
    return [dx, d_operand, *(torch.empty_like(t) for pair in stages for t in pair)]


def of_each_stage(trains: list[bool], gradients: list[Tensor]) -> tuple[list[Tensor | None], list[Tensor | None]]:
    """(dA, dB) of every stage, None where it does not train, from [dA_s, dB_s, ...] of those that do."""
    given = iter(gradients)
    pairs = [(next(given), next(given)) if train else (None, None) for train in trains]
    return [a for a, _ in pairs], [b for _, b in pairs]


def _flat(t: Tensor | None, m: int) -> Tensor | None:
    return None if t is None else t.reshape(-1, m)


def _setup_context(ctx, inputs, output) -> None:
    x, weight, _, lora_a, lora_b, scales, spans, activation, operand, _, _ = inputs
    _, h, z = output
    ctx.mark_non_differentiable(h, z)
    ctx.set_materialize_grads(False)
    ctx.trains = [a.requires_grad or b.requires_grad for a, b in zip(lora_a, lora_b, strict=True)]
    ctx.scales, ctx.spans, ctx.stages, ctx.activation = scales, spans, len(lora_a), activation
    ctx.columns, ctx.kind, ctx.has_operand = x.shape[-1], x.dtype, operand is not None
    # x is only needed where an adapter trains: a frozen layer keeps nothing but its weights.
    kept = [x, h] if any(ctx.trains) else []
    kept += [z] if activation != "none" else []
    kept += [operand] if operand is not None else []
    ctx.save_for_backward(*kept, weight, *lora_a, *lora_b)


def _backward(ctx, dy, dh, dz):
    numbers = None if ctx.scales else []  # an empty list of numbers looks like one of tensors to torch.library
    if dy is None:
        nothing = [None] * ctx.stages
        return None, None, None, nothing, nothing, numbers, None, None, None, None, None
    saved = list(ctx.saved_tensors)
    x, h = (saved.pop(0), saved.pop(0)) if any(ctx.trains) else (None, None)
    z = saved.pop(0) if ctx.activation != "none" else None
    operand = saved.pop(0) if ctx.has_operand else None
    weight, lora_a, lora_b = saved[0], saved[1 : 1 + ctx.stages], saved[1 + ctx.stages :]
    needs_dx = ctx.needs_input_grad[0]
    out = _sliced_linear_backward(
        dy.to(ctx.kind), x, h, weight, lora_a, lora_b, ctx.scales, ctx.spans, ctx.trains, needs_dx, ctx.columns,
        ctx.activation, z, operand,
    )  # fmt: skip
    da, db = of_each_stage(ctx.trains, out[2:])
    d_operand = out[1] if operand is not None and ctx.needs_input_grad[8] else None
    d_residual = dy if ctx.needs_input_grad[9] else None
    return out[0] if needs_dx else None, None, None, da, db, numbers, None, None, d_operand, d_residual, None


_sliced_linear.register_autograd(_backward, setup_context=_setup_context)
