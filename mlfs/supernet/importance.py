"""Scores heads, feed-forward units and the residual stream by importance, so that leading slices keep what matters.

Scores, per unit u:

    magnitude   Σ w² over the weights that read or write u                     (needs no data)
    activation  Σ_batches ‖x_u‖ · ‖W[:, u]‖ over the projections that read u   (Wanda, arXiv 2306.11695)
    gradient    Σ_sequences |Σ_tokens x_u · ∂L/∂x_u| over the same             (Michel et al., arXiv 1905.10650)
"""

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from mlfs.elastic.linear import ElasticLinear
from mlfs.errors import MLFSError
from mlfs.space.dimensions import AxisSize, Dimensions
from mlfs.supernet.permutation import UnitAxis, is_shared_head, numbers_per_unit, unit_axis
from mlfs.supernet.targets import loss_on, on_device

Method = Literal["magnitude", "activation", "gradient"]
Scores = dict[UnitAxis, Tensor]


def importance(
    model: PreTrainedModel,
    dims: Dimensions,
    method: Method,
    batches: Iterable[Mapping[str, Any]] | None = None,
    loss_of: Callable[[Mapping[str, Any]], Tensor | None] | None = None,
    sum_over_processes: Callable[[Tensor], Tensor] | None = None,
) -> Scores:
    """Scores every unit of an elastic model.

    Args:
        model: runs under the subnet that is active; all units are scored only under the whole model.
        dims: its full sizes.
        method: one of the scores that the module's documentation defines.
        batches: keyword arguments of the model; "magnitude" needs none. Without labels, "gradient" takes the loss
            against targets that are drawn from what the model predicts.
        loss_of: runs the model on a batch and returns its loss, a scalar; by default the model's own.
        sum_over_processes: makes of Σ x_u² of a batch that over the batches of all processes; None for one process.
            Scores by gradient are of this process: their sum is left to the caller.

    Returns:
        Scores, float64 on the CPU: (hidden,) for the residual stream; for each layer (groups of heads,) and (ffn,).

    Raises:
        MLFSError: an unknown method, or batches that are missing or empty.
    """
    if method == "magnitude":
        return _squared_weights(model, dims)
    if method not in ("activation", "gradient"):
        raise MLFSError(f"method={method!r}: expected 'magnitude', 'activation' or 'gradient'")
    if batches is None:
        raise MLFSError(f"method={method!r} needs batches to score on; give some, or use method='magnitude'")
    scores: Scores = {}
    was_training, seen = model.training, 0
    gradients = [(parameter, parameter.grad) for parameter in model.parameters()]
    model.eval()
    model.zero_grad(set_to_none=True)  # else a backward pass would add to the gradients kept above, in place
    try:
        with _scoring_inputs(model, dims, method, scores, sum_over_processes) as finish_batch:
            for batch in tqdm(batches, desc=f"importance ({method})", leave=False):
                seen += 1
                inputs = on_device(batch, model.device)
                with torch.set_grad_enabled(method == "gradient"):
                    if loss_of is not None:
                        loss = loss_of(inputs)
                    elif method == "gradient":
                        loss = loss_on(model, inputs, generator=torch.Generator().manual_seed(seen))
                    else:
                        model(**inputs)
                finish_batch()
                if method == "gradient":
                    assert loss is not None
                    loss.backward()
                    model.zero_grad(set_to_none=True)
    finally:
        model.train(was_training)
        for parameter, gradient in gradients:
            parameter.grad = gradient
    if not seen:
        raise MLFSError("no batch to score importance on: the calibration data is empty")
    return scores


def _squared_weights(model: PreTrainedModel, dims: Dimensions) -> Scores:
    """Sums the squares of the weights that read or write each unit."""
    scores: Scores = {}
    for module in model.modules():
        if isinstance(module, ElasticLinear):
            squares, axes = module.merged_weight().double().pow(2), module.axes()
            for part in axes.outputs:
                _add_numbers(scores, part.size, squares[part.start : part.stop].sum(1), dims)
            if axes.input:
                _add_numbers(scores, axes.input, squares.sum(0), dims)
    return scores


@contextmanager
def _scoring_inputs(
    model: PreTrainedModel,
    dims: Dimensions,
    method: Method,
    scores: Scores,
    sum_over_processes: Callable[[Tensor], Tensor] | None,
) -> Iterator[Callable[[], None]]:
    """Adds to `scores` after each batch that runs inside the block (for "gradient": when its gradients arrive).

    Yields:
        What to call after the forward pass of a batch.
    """
    handles = []
    seen: list[tuple[ElasticLinear, Tensor]] = []  # by "activation" in this batch: (layer, norm of its inputs)

    def score_input(module: ElasticLinear, args: tuple[Any, ...]) -> None:
        x, size = args[0], module.axes().input
        assert size is not None
        if method == "activation":
            inputs = x.detach().double().flatten(0, -2)  # (tokens, columns)
            seen.append((module, inputs.norm(dim=0)))
        elif x.requires_grad:
            values = x.detach()

            def collect(grad: Tensor) -> None:
                effect = (values * grad).double()  # (sequences, tokens, width), or (sequences, width)
                if values.dim() > 2:
                    effect = effect.flatten(1, -2).sum(1)
                per_unit = effect.view(effect.shape[0], -1, numbers_per_unit(size, dims)).sum(-1)
                _add_units(scores, size, per_unit.abs().sum(0))

            x.register_hook(collect)

    @functools.cache
    def weight_norm(module: ElasticLinear) -> Tensor:
        return module.merged_weight().double().norm(dim=0)  # (columns,)

    def finish_batch() -> None:
        norms = [norm for _, norm in seen]
        if sum_over_processes is not None and norms:
            total = sum_over_processes(torch.cat(norms).pow(2)).sqrt()
            norms = list(total.split([len(norm) for norm in norms]))
        for (module, _), norm in zip(seen, norms, strict=True):
            size = module.axes().input
            assert size is not None
            _add_numbers(scores, size, norm * weight_norm(module), dims)
        seen.clear()

    for module in model.modules():
        if isinstance(module, ElasticLinear) and module.axes().input:
            handles.append(module.register_forward_pre_hook(score_input))
    if method == "gradient":  # frozen embeddings give nothing to differentiate
        embedding = model.get_input_embeddings()
        handles.append(embedding.register_forward_hook(lambda module, args, output: output.requires_grad_()))
    try:
        yield finish_batch
    finally:
        for handle in handles:
            handle.remove()


def _add_numbers(scores: Scores, size: AxisSize, values: Tensor, dims: Dimensions) -> None:
    """Adds the scores of single numbers, summed per unit; one shared key-value head is never ranked."""
    if not is_shared_head(size, dims):
        _add_units(scores, size, values.detach().double().view(-1, numbers_per_unit(size, dims)).sum(1))


def _add_units(scores: Scores, size: AxisSize, units: Tensor) -> None:
    """Adds the scores of whole units, (units,)."""
    axis, units = unit_axis(size), units.cpu()
    scores[axis] = scores[axis] + units if axis in scores else units
