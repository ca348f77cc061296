"""Orders heads, feed-forward units and the residual stream by importance, so that leading slices keep what matters.

A permutation of these leaves the full model's function unchanged. Scores, per unit u:

    magnitude   Σ w² over the weights that read or write u                     (needs no data)
    activation  Σ_batches ‖x_u‖ · ‖W[:, u]‖ over the projections that read u   (Wanda, arXiv 2306.11695)
    gradient    Σ_sequences |Σ_tokens x_u · ∂L/∂x_u| over the same             (Michel et al., arXiv 1905.10650)
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from tqdm.auto import tqdm

from mlfs.elastic import Elastic, ElasticEmbedding, ElasticLinear
from mlfs.errors import MLFSError
from mlfs.sizes import Dimensions, Extent

if TYPE_CHECKING:
    from mlfs.supernet import SuperTransformer

Method = Literal["magnitude", "activation", "gradient"]
Key = tuple[str, int | None]  # ("hidden", None), ("heads", layer) or ("ffn", layer)
Permutation = dict[Key, list[int]]


def importance(
    supernet: "SuperTransformer", method: Method, batches: Iterable[Mapping[str, Any]] | None = None
) -> dict[Key, Tensor]:
    """Scores of every unit, float64: (hidden,), per layer (groups of heads,) and (ffn,).

    Args:
        method: see the module. batches: keyword arguments of the model, with labels for "gradient".
    """
    scores: dict[Key, Tensor] = {}
    if method == "magnitude":
        for module in _unique(supernet):
            if isinstance(module, ElasticLinear):
                squares = module.merged().double().pow(2)
                for extent, start, stop in _rows(module):
                    _add(scores, extent, squares[start:stop].sum(1), supernet.dimensions)
                if module._reads:
                    _add(scores, module._reads, squares.sum(0), supernet.dimensions)
        return scores
    if method not in ("activation", "gradient"):
        raise MLFSError(f"method={method!r}: expected 'magnitude', 'activation' or 'gradient'")
    if batches is None:
        raise MLFSError(f"method={method!r} needs batches to score on; give some, or use method='magnitude'")
    was_training, seen = supernet.model.training, 0
    gradients = [(parameter, parameter.grad) for parameter in supernet.model.parameters()]
    supernet.model.eval()
    supernet.model.zero_grad(set_to_none=True)  # else the ones that are there would be added to, in place
    try:
        with supernet.activate(supernet.space.max), _watched(supernet, method, scores):
            for batch in tqdm(batches, desc=f"importance ({method})", leave=False):
                seen += 1
                inputs = {k: v.to(supernet.model.device) if isinstance(v, Tensor) else v for k, v in batch.items()}
                with torch.set_grad_enabled(method == "gradient"):
                    loss = supernet.model(**inputs).loss
                if method == "gradient":
                    if loss is None:
                        raise MLFSError("the gradient score needs labels in the batches")
                    loss.backward()
                    supernet.model.zero_grad(set_to_none=True)
    finally:
        supernet.model.train(was_training)
        for parameter, gradient in gradients:
            parameter.grad = gradient
    if not seen:
        raise MLFSError("no batch to score importance on: the calibration data is empty")
    return scores


def permutation_of(scores: Mapping[Key, Tensor]) -> Permutation:
    """For each axis the old index of every unit in its new place, most important first; ties keep their order."""
    return {key: torch.argsort(s, descending=True, stable=True).tolist() for key, s in scores.items()}


@torch.no_grad()
def permute(supernet: "SuperTransformer", permutation: Permutation) -> None:
    """Reorders all weights, adapters and heads in place."""
    dims, done = supernet.dimensions, set()

    def apply(parameter: Tensor | None, axis: int, index: Tensor) -> None:
        if parameter is not None and (id(parameter), axis) not in done:
            done.add((id(parameter), axis))
            parameter.copy_(parameter.index_select(axis, index.to(parameter.device)))

    for module in _unique(supernet):
        if isinstance(module, ElasticLinear):
            # A tied output head shares the embedding's matrix: (out, in) there, (in, out) in a Conv1D.
            rows = torch.arange(module.out_features)
            for extent, start, stop in _rows(module):
                rows[start:stop] = start + _expand(permutation.get(_key(extent)), extent, stop - start, dims)
            apply(module.weight, int(module.transposed), rows)
            apply(module.bias, 0, rows)
            for b in module.lora_B:
                apply(b, 0, rows)
            if module._reads:
                columns = _expand(permutation.get(_key(module._reads)), module._reads, module.in_features, dims)
                apply(module.weight, int(not module.transposed), columns)
                for a in module.lora_A:
                    apply(a, 1, columns)
        else:
            extent = module._extents[0]
            width = module.weight.shape[-1]
            columns = _expand(permutation.get(_key(extent)), extent, width, dims)
            apply(module.weight, int(isinstance(module, ElasticEmbedding)), columns)
            apply(module.bias, 0, columns)


def compose(first: Permutation, then: Permutation) -> Permutation:
    """The permutation that does `first`, then `then`."""
    keys = first.keys() | then.keys()
    return {
        key: [first[key][i] for i in then[key]] if key in first and key in then else first.get(key, then.get(key, []))
        for key in keys
    }


def check_permutation(permutation: Permutation, dims: Dimensions) -> None:
    """MLFSError unless every entry is a permutation of an axis of the model."""
    lengths = {"hidden": dims.hidden, "heads": dims.heads // dims.group, "ffn": dims.ffn}
    for (axis, layer), order in permutation.items():
        known = axis in lengths and (layer is None) == (axis == "hidden") and (layer is None or layer < dims.layers)
        if not known or sorted(order) != list(range(lengths[axis])):
            raise MLFSError(f"the permutation of {axis} (layer {layer}) is not one of this model's")


def _unique(supernet: "SuperTransformer") -> Iterator[Elastic]:
    yield from (m for m in supernet.model.modules() if isinstance(m, Elastic))


def _key(extent: Extent) -> Key:
    return ("heads" if extent.axis == "kv_heads" else extent.axis, extent.layer)


def _rows(module: ElasticLinear) -> Iterator[tuple[Extent, int, int]]:
    """(extent, first row, end row) of each part of the output that follows an axis."""
    start = 0
    for extent, part in zip(module._extents, module._parts, strict=bool(module._extents)):
        yield extent, start, start + part
        start += part


def _unit(extent: Extent, dims: Dimensions) -> int:
    """Numbers per unit that moves: for query heads a whole group."""
    return extent.unit * (dims.group if extent.axis == "heads" else 1)


def _expand(order: list[int] | None, extent: Extent, width: int, dims: Dimensions) -> Tensor:
    """Indices of single numbers from an order of units; one shared key-value head stays where it is."""
    unit = _unit(extent, dims)
    if order is None or (extent.axis == "kv_heads" and dims.kv_heads == 1):
        return torch.arange(width)
    return (torch.tensor(order)[:, None] * unit + torch.arange(unit)).flatten()


def _add(scores: dict[Key, Tensor], extent: Extent, values: Tensor, dims: Dimensions) -> None:
    """Adds the scores of single numbers, summed per unit; one shared key-value head is never ranked."""
    if not (extent.axis == "kv_heads" and dims.kv_heads == 1):
        _accumulate(scores, extent, values.detach().double().view(-1, _unit(extent, dims)).sum(1))


def _accumulate(scores: dict[Key, Tensor], extent: Extent, units: Tensor) -> None:
    key = _key(extent)
    scores[key] = scores[key] + units.cpu() if key in scores else units.cpu()


@contextmanager
def _watched(supernet: "SuperTransformer", method: Method, scores: dict[Key, Tensor]) -> Iterator[None]:
    """Adds to `scores` at every projection's input while the block runs."""
    dims, handles = supernet.dimensions, []

    def watch(module: ElasticLinear, args: tuple[Any, ...]) -> None:
        x, extent = args[0], module._reads
        assert extent is not None
        unit = _unit(extent, dims)
        if method == "activation":
            norms = x.detach().double().flatten(0, -2).norm(dim=0) * module.merged().double().norm(dim=0)
            _add(scores, extent, norms, dims)
        elif x.requires_grad:
            values = x.detach()

            def collect(grad: Tensor) -> None:
                effect = (
                    (values * grad).double().flatten(1, -2).sum(1) if values.dim() > 2 else (values * grad).double()
                )
                per_unit = effect.view(effect.shape[0], -1, unit).sum(-1).abs().sum(0)
                _accumulate(scores, extent, per_unit)

            x.register_hook(collect)

    for module in supernet.model.modules():
        if isinstance(module, ElasticLinear) and module._reads:
            handles.append(module.register_forward_pre_hook(watch))
    if method == "gradient":  # frozen embeddings give nothing to differentiate
        embedding = supernet.model.get_input_embeddings()
        handles.append(embedding.register_forward_hook(lambda module, args, output: output.requires_grad_()))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
