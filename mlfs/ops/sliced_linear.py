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

In code z is `pre`, and T the number of tokens.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import gelu, linear, silu

from mlfs.errors import MLFSError
from mlfs.ops.autograd import (
    differentiable,
    flat_rows,
    gradients_of_layers,
    keep_layers,
    kept_layers,
    like_trained,
    tokens_of,
    wanted_if,
)
from mlfs.ops.backend import in_autocast_type, run, runs_as_operators
from mlfs.ops.backends.table import implements
from mlfs.ops.layer import (
    ACTIVATIONS,
    NOTHING,
    Activated,
    Epilogue,
    FlatLayers,
    LowRankLinear,
    Wanted,
    flatten,
    unflatten,
)

__all__ = ["sliced_linear", "sliced_linear_reference"]


def sliced_linear_reference(x: Tensor, layer: LowRankLinear, epilogue: Epilogue = NOTHING) -> Tensor:
    """Computes the formula in plain, differentiable PyTorch (also in W and b: task heads train through it)."""
    columns = x.shape[-1]
    parts = []  # of each span (..., length)
    for rows, _ in layer.places:
        bias = layer.bias
        if bias is not None:
            bias = bias[rows].to(x.dtype)
        parts.append(linear(x, layer.weight[rows, :columns].to(x.dtype), bias))
    y = _side_by_side(parts, -1)  # (..., m)
    for lora_a, lora_b, scale in zip(layer.lora_a, layer.lora_b, layer.scales, strict=True):
        h = linear(x, lora_a[:, :columns].to(x.dtype))  # (..., r_s)
        y = y + linear(h, _read_rows(lora_b, layer).to(x.dtype)) * scale
    return finish(y, epilogue)


def sliced_linear(x: Tensor, layer: LowRankLinear, epilogue: Epilogue = NOTHING) -> Tensor:
    """Computes the formula above, with W and b frozen.

    Args:
        x: (..., n), floating point. Under autocast it is cast to the autocast type; the result has its type.
        layer: its weight may have any strides and any floating type; it is never written, and never copied when it has
            x's type.
        epilogue: activation, operand and residual; the residual is added last.

    Returns:
        (..., m) of x's type; with a residual, of the wider of theirs.

    Raises:
        MLFSError: an unknown activation, or an operand where none belongs or none where one does.
    """
    check_epilogue(epilogue)
    activation, operand, residual = epilogue
    x = in_autocast_type(x)
    if operand is not None:
        operand = in_autocast_type(operand)
    if not runs_as_operators():
        return sliced_linear_reference(x, layer, Epilogue(activation, operand, residual))
    leaves = (x, operand, residual, *layer.lora_a, *layer.lora_b)
    keep = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in leaves)
    # Without `keep` nothing is written for a backward pass, and a few tokens take the kernels for decoding.
    return _sliced_linear(x, operand, residual, *flatten([layer]), activation, keep)[0]


def check_epilogue(epilogue: Epilogue) -> None:
    """Raises MLFSError for an unknown activation, or an operand where none belongs or none where one does."""
    activation, operand, _ = epilogue
    if activation not in ACTIVATIONS or (operand is not None) != (activation == "silu_mul"):
        has_operand = "without" if operand is None else "with"
        raise MLFSError(
            f"activation={activation!r} {has_operand} an operand: expected one of {', '.join(ACTIVATIONS)}; only "
            "silu_mul takes an operand, and needs it"
        )


def finish(pre: Tensor, epilogue: Epilogue) -> Tensor:
    """Computes act(pre) [· operand] + residual in plain, differentiable PyTorch."""
    activation, operand, residual = epilogue
    y = pre
    if operand is not None:
        y = silu(pre) * operand
    elif activation != "none":
        y = gelu(pre, approximate=_form_of_gelu(activation))
    if residual is not None:
        y = y + residual
    return y


def _form_of_gelu(activation: str) -> str:
    return "tanh" if activation == "gelu_tanh" else "none"


def _side_by_side(parts: Sequence[Tensor], dim: int) -> Tensor:
    """The parts along `dim`; a single one as it is, without a copy."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim)


def _read_rows(lora_b: Tensor, layer: LowRankLinear) -> Tensor:
    """B_s[rows, :], (m, r_s)."""
    return _side_by_side([lora_b[rows] for rows, _ in layer.places], 0)


# ---- what backends implement, on 2-d tensors -------------------------------------------------------------------------


def linear_forward(x: Tensor, layer: LowRankLinear, epilogue: Epilogue, keep: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Computes the formula for x (T, n), by the backend for these tensors.

    Returns:
        (y (T, m), h (T, Σ r_s), pre (T, m)): h are the stages' c_s · x A_sᵀ side by side, pre is what goes into act.
        Both are for the backward pass: without `keep` they are empty, and pre is where act does nothing.
    """
    on = (x, *layer.tensors, epilogue.operand, epilogue.residual)
    return run("linear_forward", on, x, layer, epilogue, keep)


@implements("reference", "linear_forward")
def linear_forward_reference(
    x: Tensor, layer: LowRankLinear, epilogue: Epilogue, keep: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Computes `linear_forward` in plain PyTorch."""
    # Products and adapters are written to one output, where autograd's own way makes a new one for each.
    pre = x.new_empty(x.shape[0], layer.rows)  # (T, m)
    for rows, place in layer.places:
        _product_into(pre[:, place], x, layer, rows)
    h = x.new_empty(x.shape[0], sum(layer.ranks))  # (T, Σ r_s)
    stages = zip(layer.lora_a, layer.lora_b, layer.scales, h.split(layer.ranks, 1), strict=True)
    for lora_a, lora_b, scale, h_of_stage in stages:
        # The scale goes into h, not into y: the backward pass then finds it there for dB.
        h_of_stage.copy_(x @ lora_a[:, : x.shape[1]].to(x.dtype).t()).mul_(scale)
        pre.addmm_(h_of_stage, _read_rows(lora_b, layer).to(x.dtype).t())
    y = finish(pre, epilogue)
    if not keep:
        h = x.new_empty(0)
    if not keep or epilogue.activation == "none":  # pre is y then, and outputs share no memory
        pre = x.new_empty(0)
    return y, h, pre


def _product_into(out: Tensor, x: Tensor, layer: LowRankLinear, rows: slice) -> None:
    """Writes x · W[rows, :n]ᵀ + b[rows] to out (T, rows)."""
    weight = layer.weight[rows, : x.shape[1]].to(x.dtype).t()  # (n, rows)
    result = out if out.is_contiguous() else None  # PyTorch would write to others by way of a copy, too
    if layer.bias is None:
        product = torch.mm(x, weight, out=result)
    else:
        product = torch.addmm(layer.bias[rows].to(x.dtype), x, weight, out=result)
    if result is None:
        out.copy_(product)


def activation_backward(
    dy: Tensor, pre: Tensor, operand: Tensor | None, activation: str
) -> tuple[Tensor, Tensor | None]:
    """Computes (d_pre, d_operand or None) of y = act(pre) [· operand] from dy, all (T, m)."""
    return run("activation_backward", (dy, pre, operand), dy, pre, operand, activation)


@implements("reference", "activation_backward")
def _activation_backward(
    dy: Tensor, pre: Tensor, operand: Tensor | None, activation: str
) -> tuple[Tensor, Tensor | None]:
    # PyTorch's own derivatives, which autograd of the reference calls, too.
    if operand is not None:
        return torch.ops.aten.silu_backward(dy * operand, pre), dy * silu(pre)
    return torch.ops.aten.gelu_backward(dy, pre, approximate=_form_of_gelu(activation)), None


def linear_backward(
    dy: Tensor,
    x: Tensor | None,
    h: Tensor | None,
    layer: LowRankLinear,
    wanted: Wanted,
    residual: Tensor | None = None,
) -> tuple[Tensor, list[Tensor]]:
    """Computes the gradients of the linear part, by the backend for these tensors.

    Args:
        dy: (T, m). x (T, n), h (T, Σ r_s): of the forward pass; None where no stage trains.
        residual: (T, n), added to dx.

    Returns:
        (dx (T, n), or (0, n) where it is not wanted; [dA_s, dB_s, ...] of the stages that train, zero off the slice).
    """
    return run("linear_backward", (dy, *layer.tensors), dy, x, h, layer, wanted, residual)


@implements("reference", "linear_backward")
def linear_backward_reference(
    dy: Tensor,
    x: Tensor | None,
    h: Tensor | None,
    layer: LowRankLinear,
    wanted: Wanted,
    residual: Tensor | None = None,
) -> tuple[Tensor, list[Tensor]]:
    """Computes `linear_backward` in plain PyTorch."""
    tokens, columns = dy.shape[0], wanted.columns
    dx = dy.new_empty((0, columns))
    if wanted.dx:
        dx = dy.new_empty((tokens, columns))
        for i, (rows, place) in enumerate(layer.places):
            weight = layer.weight[rows, :columns].to(dy.dtype)
            torch.addmm(dx, dy[:, place], weight, beta=float(i > 0), out=dx)  # the first span writes, others add
    gradients = []
    offset = 0  # of the stage's ranks in h
    for lora_a, lora_b, scale, trains in zip(layer.lora_a, layer.lora_b, layer.scales, wanted.trains, strict=True):
        ranks = slice(offset, offset + lora_a.shape[0])
        offset = ranks.stop
        if not (trains or wanted.dx):
            continue
        dh = (dy @ _read_rows(lora_b, layer).to(dy.dtype)).mul_(scale)  # (T, r_s)
        if wanted.dx:
            dx.addmm_(dh, lora_a[:, :columns].to(dy.dtype))
        if trains:
            assert x is not None and h is not None
            # At the full width, as optimizers and checkpoints have the parameters: zero off the slice.
            d_lora_a, d_lora_b = torch.zeros_like(lora_a), torch.zeros_like(lora_b)
            d_lora_a[:, :columns] = dh.t() @ x  # (r_s, n)
            d_rows = dy.t() @ h[:, ranks]  # (m, r_s)
            for rows, place in layer.places:
                d_lora_b[rows] = d_rows[place]
            gradients += [d_lora_a, d_lora_b]
    if residual is not None:
        dx = dx + residual
    return dx, gradients


def linear_backward_through_activation(
    dy: Tensor, x: Tensor | None, h: Tensor | None, layer: LowRankLinear, wanted: Wanted, activated: Activated
) -> tuple[Tensor, Tensor | None, list[Tensor]]:
    """Computes the gradients of a layer and of the activation before it, by the backend for these tensors.

    Args:
        dy, x, h, layer, wanted: as `linear_backward` takes them; x may also be None where the backend makes it again
            from `activated`, see `makes_activated_again`.

    Returns:
        (d_pre (T, n), d_operand (T, n) or None, [dA_s, dB_s, ...] of the stages that train); the first two are not to
        be read where dx is not wanted.
    """
    on = (dy, *layer.tensors, activated.pre, activated.operand)
    return run("linear_backward_through_activation", on, dy, x, h, layer, wanted, activated)


@implements("reference", "linear_backward_through_activation")
def _linear_backward_through_activation(
    dy: Tensor, x: Tensor | None, h: Tensor | None, layer: LowRankLinear, wanted: Wanted, activated: Activated
) -> tuple[Tensor, Tensor | None, list[Tensor]]:
    dx, gradients = linear_backward(dy, x, h, layer, wanted)
    if not wanted.dx:
        return dx, None, gradients
    d_pre, d_operand = activation_backward(dx, activated.pre, activated.operand, activated.activation)
    return d_pre, d_operand, gradients


def makes_activated_again(x: Tensor) -> bool:
    """Says whether `linear_backward_through_activation` makes what an activation gave again, instead of reading it."""
    return run("makes_activated_again", (x,), x)


@implements("reference", "makes_activated_again")
def _makes_activated_again(x: Tensor) -> bool:
    return False


# ---- the operator ----------------------------------------------------------------------------------------------------


@torch.library.custom_op("mlfs::sliced_linear", mutates_args=())
def _sliced_linear(
    x: Tensor,
    operand: Tensor | None,
    residual: Tensor | None,
    weights: list[Tensor],
    biases: list[Tensor],
    lora_a: list[Tensor],
    lora_b: list[Tensor],
    scales: list[float],
    spans: list[int],
    activation: str,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(y, h, pre) of one layer: see `linear_forward`; y is (..., m), the others are 2-d."""
    (layer,) = unflatten(weights, biases, lora_a, lora_b, scales, spans)
    # (T, n), and (T, m) of the others: backends know two dimensions.
    epilogue = Epilogue(activation, flat_rows(operand), flat_rows(residual))
    y, h, pre = linear_forward(flat_rows(x), layer, epilogue, keep)
    return y.view(*x.shape[:-1], layer.rows), h, pre


@_sliced_linear.register_fake
def _(x, operand, residual, weights, biases, lora_a, lora_b, scales, spans, activation, keep):
    rows, tokens = sum(spans[1::2]), tokens_of(x)
    dtype = x.dtype  # a wider residual, as of a stream in fp32, keeps its type
    if residual is not None:
        dtype = torch.result_type(x, residual)
    y = x.new_empty(*x.shape[:-1], rows, dtype=dtype)
    h, pre = x.new_empty(0), x.new_empty(0)
    if keep:
        h = x.new_empty((tokens, sum(stage.shape[0] for stage in lora_a)))
    if keep and activation != "none":
        pre = x.new_empty((tokens, rows))
    return y, h, pre


@torch.library.custom_op("mlfs::sliced_linear_backward", mutates_args=())
def _sliced_linear_backward(
    dy: Tensor,
    x: Tensor | None,
    h: Tensor | None,
    pre: Tensor | None,
    operand: Tensor | None,
    weights: list[Tensor],
    lora_a: list[Tensor],
    lora_b: list[Tensor],
    scales: list[float],
    spans: list[int],
    trains: list[bool],
    needs_dx: bool,
    columns: int,
    activation: str,
) -> list[Tensor]:
    """[dx (empty unless needed), d_operand (empty unless there is one), dA_s and dB_s of each stage s that trains]; the
    gradients are zero off the slice."""
    (layer,) = unflatten(weights, [], lora_a, lora_b, scales, spans)
    leading, rows = dy.shape[:-1], dy.shape[-1]
    # Back through what follows the product, then through the product.
    d_pre, d_operand = flat_rows(dy), None
    if pre is not None:
        d_pre, d_operand = activation_backward(d_pre, pre, flat_rows(operand), activation)
    wanted = Wanted(trains, needs_dx, columns)
    dx, gradients = linear_backward(d_pre, flat_rows(x), h, layer, wanted)
    if needs_dx:
        dx = dx.view(*leading, columns)
    if d_operand is None:
        d_operand = dy.new_empty((0, rows))
    else:
        d_operand = d_operand.view(dy.shape)
    return [dx, d_operand, *gradients]


@_sliced_linear_backward.register_fake
def _(
    dy, x, h, pre, operand, weights, lora_a, lora_b, scales, spans, trains, needs_dx, columns, activation
):  # fmt: skip
    dx = dy.new_empty((*dy.shape[:-1], columns) if needs_dx else (0, columns))
    d_operand = dy.new_empty((0, dy.shape[-1]) if operand is None else dy.shape)
    return [dx, d_operand, *like_trained(lora_a, lora_b, trains)]


def _keep(ctx: Any, inputs: Sequence[Any], output: Sequence[Tensor]) -> None:
    x, operand, _, *layer, activation, _ = inputs
    _, h, pre = output
    ctx.activation = activation
    # x and h are only read where an adapter trains, pre only where something follows the product.
    kept_pre = None if activation == "none" else pre
    keep_layers(ctx, x, FlatLayers(*layer), for_adapters=(x, h), others=(kept_pre, operand))


def _gradients(ctx: Any, of_outputs: Sequence[Tensor | None], of_input: None) -> tuple[Any, ...]:
    dy = of_outputs[0]
    if dy is None:
        return None, None, None, *gradients_of_layers(ctx, None), None, None
    needs_dx, needs_operand, needs_residual = ctx.needs_input_grad[:3]
    (x, h, pre, operand), layers = kept_layers(ctx)
    # dy has the residual's type where that is wider; the products read x's.
    dx, d_operand, *of_stages = _sliced_linear_backward(
        dy.to(ctx.dtype), x, h, pre, operand, *layers, ctx.trains, needs_dx, ctx.columns, ctx.activation
    )
    return (
        wanted_if(needs_dx, dx),
        wanted_if(needs_operand, d_operand),
        wanted_if(needs_residual, dy),
        *gradients_of_layers(ctx, of_stages),
        None,
        None,
    )


differentiable(_sliced_linear, _keep, _gradients, results=lambda inputs: 1)
