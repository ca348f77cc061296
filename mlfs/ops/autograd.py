"""What the operators' gradients have in common: what is kept of layers, their gradients, and x handed on.

An operator here is one of `torch.library`. Its first inputs are the single tensors that may get a gradient, x before
all; then come its layers, as `mlfs.ops.layer.flatten` lays them out; then options. Its first outputs are results, the
others are kept for the backward pass, and have no gradient.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from mlfs.errors import MLFSError
from mlfs.ops.layer import FlatLayers

Returning = Callable[..., tuple[Tensor, ...]]


def keep_layers(
    ctx: Any, x: Tensor, layers: FlatLayers, for_adapters: Sequence[Tensor], others: Sequence[Tensor | None] = ()
) -> None:
    """Keeps on `ctx` what the backward pass of layers that read `x` needs.

    Args:
        for_adapters: what only gradients of adapters are made of. Where none trains it is not kept: a frozen layer
            keeps nothing but its weights.
        others: what is always needed; None where there is nothing.
    """
    ctx.set_materialize_grads(False)  # None, not zeros, for a result that nothing comes back through
    pairs = zip(layers.lora_a, layers.lora_b, strict=True)
    ctx.trains = [lora_a.requires_grad or lora_b.requires_grad for lora_a, lora_b in pairs]
    ctx.counts = len(for_adapters) + len(others), len(layers.weights), len(layers.biases), len(layers.lora_a)
    ctx.scales, ctx.spans = layers.scales, layers.spans
    ctx.columns, ctx.dtype = x.shape[-1], x.dtype  # x itself may not be kept
    first: list[Tensor | None] = [None] * len(for_adapters)
    if any(ctx.trains):
        first = list(for_adapters)
    # Without biases, which no gradient reads.
    ctx.save_for_backward(*first, *others, *layers.weights, *layers.lora_a, *layers.lora_b)


def kept_layers(ctx: Any) -> tuple[list[Tensor | None], list[Any]]:
    """Finds what `keep_layers` kept.

    Returns:
        (`for_adapters` and `others`, None where they were not kept; the fields of the layers but the biases).
    """
    others, weights, _, stages = ctx.counts
    saved = list(ctx.saved_tensors)
    lora = saved[others + weights :]
    layers = [saved[others : others + weights], lora[:stages], lora[stages:], ctx.scales, ctx.spans]
    return saved[:others], layers


def gradients_of_layers(ctx: Any, gradients: Sequence[Tensor] | None) -> tuple[list[Any] | None, ...]:
    """The gradients of the fields of `FlatLayers`, from [dA_s, dB_s, ...] of the stages that train; None for none."""
    _, weights, biases, _ = ctx.counts
    given = iter(gradients or ())
    of_a: list[Tensor | None] = []
    of_b: list[Tensor | None] = []
    for train in ctx.trains:
        trained = train and gradients is not None
        of_a.append(next(given) if trained else None)
        of_b.append(next(given) if trained else None)
    return [None] * weights, [None] * biases, of_a, of_b, no_gradient(ctx.scales), no_gradient(ctx.spans)


def no_gradient(numbers: Sequence[float]) -> list[Any] | None:
    """What torch.library expects for a list of numbers: an empty one looks to it like an empty list of tensors."""
    return None if numbers else []


def wanted_if(wanted: bool, gradient: Tensor) -> Tensor | None:
    """The gradient where it is wanted, else None."""
    return gradient if wanted else None


def like_trained(lora_a: Sequence[Tensor], lora_b: Sequence[Tensor], trains: Sequence[bool]) -> list[Tensor]:
    """New tensors [dA_s, dB_s, ...] for the stages that train, for fake versions of operators."""
    return [torch.empty_like(t) for pair in _trained(lora_a, lora_b, trains) for t in pair]


def _trained(lora_a: Sequence[Tensor], lora_b: Sequence[Tensor], trains: Sequence[bool]) -> list[tuple[Tensor, Tensor]]:
    stages = zip(lora_a, lora_b, trains, strict=True)
    return [(stage_a, stage_b) for stage_a, stage_b, train in stages if train]


def flat_rows(x: Tensor | None) -> Any:
    """x (..., n) as (tokens, n); None as it is."""
    return None if x is None else x.reshape(-1, x.shape[-1])


def tokens_of(x: Tensor) -> int:
    """The number of tokens of x (..., n), for fake versions of operators: a symbol where its shape has one."""
    # Not numel() of the shape, which is a plain number always: what is traced would run for this length alone.
    return math.prod(x.shape[:-1])


def differentiable(
    operator: Any,
    keep: Callable[[Any, Sequence[Any], Sequence[Tensor]], None],
    gradients: Callable[[Any, Sequence[Tensor | None], Any], tuple[Any, ...]],
    results: Callable[[Sequence[Any]], int],
    twice: bool = False,
) -> Returning:
    """Registers an operator's gradients, and makes the function that also hands its x on.

    What else reads x may read what the function hands on instead: the gradient that comes back through it is then added
    by the kernel that makes dx, not by a pass of its own. The operator itself cannot hand x on, as the outputs of one
    share no memory with its inputs.

    Args:
        keep: (ctx, inputs, outputs) -> None: keeps on ctx what the backward pass reads.
        gradients: (ctx, those of the results, that of the x handed on) -> those of the inputs.
        results: (inputs) -> how many outputs are results.
        twice: whether `gradients` may be differentiated itself; else that is refused, see `refuse_second_gradients`.

    Returns:
        A function of the operator's inputs that returns (*results, x).
    """

    def keep_of_operator(ctx: Any, inputs: Sequence[Any], output: Sequence[Tensor]) -> None:
        ctx.mark_non_differentiable(*output[results(inputs) :])
        keep(ctx, inputs, output)

    def backward_of_operator(ctx: Any, *of_outputs: Tensor | None) -> tuple[Any, ...]:
        if not twice:
            refuse_second_gradients()
        return gradients(ctx, of_outputs, None)

    operator.register_autograd(backward_of_operator, setup_context=keep_of_operator)

    class ReturnsInput(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, ...]:
            inputs = _gather(arguments[:-1], arguments[-1])
            outputs = operator(*inputs)
            keep(ctx, inputs, outputs)
            x = inputs[0]
            return *outputs[: results(inputs)], x.view_as(x)

        @staticmethod
        def backward(ctx: Any, *of_outputs: Tensor | None) -> tuple[Any, ...]:
            if not twice:
                refuse_second_gradients()
            found = gradients(ctx, of_outputs[:-1], of_outputs[-1])
            return *_spread_gradients(found), None

    def returning_input(*inputs: Any) -> tuple[Tensor, ...]:
        return ReturnsInput.apply(*_spread(inputs), _lengths(inputs))

    return returning_input


def refuse_second_gradients() -> None:
    """Raises MLFSError in a backward pass whose gradients are to be differentiated themselves (`create_graph=True`).

    Backward passes of operators are operators without gradients of their own, and some take as constant what depends
    on the input: left alone, PyTorch would fail somewhere later, or give wrong second gradients.
    """
    if torch.is_grad_enabled():  # in a backward pass: only for create_graph=True
        raise MLFSError(
            "gradients of gradients (create_graph=True) are computed by plain PyTorch alone: run the forward "
            'pass inside `with mlfs.ops.backend.use_backend("autograd")`, or set MLFS_BACKEND=autograd'
        )


# A function of autograd sees no tensors within lists: their tensors are arguments of their own there.


def _lengths(inputs: Sequence[Any]) -> tuple[int | None, ...]:
    """The number of tensors of each input that is a list of some; None for any other input."""
    return tuple(len(value) if _holds_tensors(value) else None for value in inputs)


def _holds_tensors(value: Any) -> bool:
    return isinstance(value, list) and len(value) > 0 and isinstance(value[0], Tensor)


def _spread(inputs: Sequence[Any]) -> list[Any]:
    arguments: list[Any] = []
    for value in inputs:
        if _holds_tensors(value):
            arguments += value
        else:
            arguments.append(value)
    return arguments


def _spread_gradients(gradients: Sequence[Any]) -> list[Tensor | None]:
    spread: list[Tensor | None] = []
    for gradient in gradients:
        if isinstance(gradient, list):
            spread += gradient or [None]  # an empty list was one argument
        else:
            spread.append(gradient)
    return spread


def _gather(arguments: Sequence[Any], lengths: Sequence[int | None]) -> list[Any]:
    inputs: list[Any] = []
    place = 0
    for length in lengths:
        if length is None:
            inputs.append(arguments[place])
            place += 1
        else:
            inputs.append(list(arguments[place : place + length]))
            place += length
    return inputs
