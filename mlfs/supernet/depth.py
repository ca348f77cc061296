"""Ranks layers by what the whole model loses without them.

    influence   a layer's is the mean over tokens of 1 - cos(its input, its output)  (ShortGPT, arXiv 2403.03853)
    loss        layers are taken out one by one, each time the one without which the loss is least

Both take the layers that are left as they are: a layer out, the next one is sought in the model without it. So the
layers of each depth are among those of every larger one.
"""

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from mlfs.errors import MLFSError
from mlfs.supernet.targets import LABELS, OwnTargets, has_labels, loss_on, on_device

LayerMethod = Literal["auto", "loss", "influence", "even"]
METHODS = ("auto", "loss", "influence", "even")
# Of SmolLM2, taking each of a few layers of least influence out finds depths as good as trying all of them does.
CANDIDATES = 3
BATCHES, PREDICTIONS = 8, 2048  # at most so many batches, and no more once they have so many labels
MOST_PREDICTIONS = 2**22  # numbers a batch, 16 MB: those of a language model would take gigabytes


def check_layer_method(method: str) -> None:
    """Raises MLFSError unless layers can be ranked so."""
    if method not in METHODS:
        raise MLFSError(f"layers={method!r}: expected one of {', '.join(map(repr, METHODS))}")


def method_of(model: PreTrainedModel, method: LayerMethod) -> LayerMethod:
    """Chooses how the layers of a model are ranked where that is left open: "loss" for models that generate text, of
    which a slice has to be good at once; else "even", which trains to better scores (docs/results.md)."""
    if method != "auto":
        return method
    return "loss" if model.can_generate() else "even"


class DepthSearch:
    """Takes layers out of a model one by one.

    Args:
        layers: all of the model's.
        run: runs the model on batch i with only the layers that are kept; returns its loss, a scalar.
        masks: the attention mask of each batch, (batch, tokens), or None.
        reduce: makes of a vector that of this process the sum of all processes.
    """

    def __init__(
        self,
        layers: nn.ModuleList,
        run: Callable[[int, tuple[int, ...]], Tensor],
        masks: Sequence[Tensor | None],
        reduce: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self.layers, self.run, self.masks = layers, run, masks
        self.reduce = reduce if reduce is not None else (lambda total: total)

    @torch.no_grad()
    def ranking(self, method: LayerMethod, least: int, candidates: int = CANDIDATES) -> list[int]:
        """Lists all layers, those that matter most first.

        Args:
            least: layers of the shallowest depth: those of it are not told apart further, and keep their order.
            candidates: by loss, how many layers of least influence are tried each time.
        """
        kept, out = list(range(len(self.layers))), []
        found = self.measure(kept)
        for _ in tqdm(range(len(kept) - least), desc=f"layers by {method}", leave=False):
            tried = sorted(kept, key=found.influence.__getitem__)[: 1 if method == "influence" else candidates]
            without = {layer: self.measure([other for other in kept if other != layer]) for layer in tried}
            gone = min(tried, key=lambda layer: without[layer].loss)
            kept.remove(gone)
            out.append(gone)
            found = without[gone]
        return kept + out[::-1]

    def measure(self, kept: Sequence[int]) -> "Measured":
        """Runs the model on all batches with only the layers that are kept."""
        sums = torch.zeros(len(kept) + 3, dtype=torch.float64)  # of 1 - cos by layer, of tokens, losses and batches
        for i, mask in enumerate(self.masks):
            with _watching(self.layers, kept, mask) as changes:
                loss = float(self.run(i, tuple(kept)))
            sums[: len(kept)] += torch.stack([changes[layer].sum() for layer in kept])
            sums[-3:] += torch.tensor([changes[kept[0]].numel(), loss, 1], dtype=torch.float64)
        sums = self.reduce(sums)
        influence = (sums[:-3] / sums[-3].clamp_min(1)).tolist()
        return Measured(float(sums[-2] / sums[-1]), dict(zip(kept, influence, strict=True)))


@dataclass(frozen=True)
class Measured:
    """What a model with some of its layers does: its mean loss, and each layer's influence."""

    loss: float
    influence: dict[int, float]


@contextmanager
def _watching(layers: nn.ModuleList, kept: Sequence[int], attention_mask: Tensor | None) -> Iterator[dict[int, Tensor]]:
    """Yields what each layer has done once the model has run: 1 - cos of each token that is no padding, (tokens,)."""
    changes: dict[int, Tensor] = {}
    handles = []
    for layer in kept:

        def note(module: nn.Module, args: Any, kwargs: Any, output: Any, layer: int = layer) -> None:
            before = args[0] if args else kwargs["hidden_states"]
            after = output[0] if isinstance(output, tuple) else output
            change = 1 - torch.cosine_similarity(before.double(), after.double(), dim=-1)  # (batch, tokens)
            if attention_mask is not None and attention_mask.shape == change.shape:
                change = change[attention_mask.bool()]
            changes[layer] = change.flatten().cpu()

        handles.append(layers[layer].register_forward_hook(note, with_kwargs=True))
    try:
        yield changes
    finally:
        for handle in handles:
            handle.remove()


def rank_layers(
    supernet: Any,
    method: LayerMethod,
    batches: Iterable[Mapping[str, Any]],
    loss_of: Callable[[Mapping[str, Any], OwnTargets | None], Tensor] | None = None,
    reduce: Callable[[Tensor], Tensor] | None = None,
) -> list[int]:
    """Ranks all layers of a super-transformer at full width, those that matter most first.

    Args:
        method: "influence" or "loss", as the module's documentation defines them.
        batches, loss_of, reduce: see `depth_search`.

    Raises:
        MLFSError: no batch; or a method that ranks nothing.
    """
    if method not in ("loss", "influence"):
        raise MLFSError(f"method={method!r} ranks no layers: expected 'loss' or 'influence'")
    with depth_search(supernet, batches, loss_of, reduce) as search:
        return search.ranking(method, least=supernet.space.min.depth)


@contextmanager
def depth_search(
    supernet: Any,
    batches: Iterable[Mapping[str, Any]],
    loss_of: Callable[[Mapping[str, Any], OwnTargets | None], Tensor] | None = None,
    reduce: Callable[[Tensor], Tensor] | None = None,
) -> Iterator[DepthSearch]:
    """Readies a super-transformer, at full width and for evaluation, to have layers taken out inside the block.

    Args:
        batches: keyword arguments of the model, of which the first are used: up to `BATCHES`, or `PREDICTIONS` labels.
        loss_of: runs the model on a batch and returns its loss; by default the model's own, or against what the
            whole model predicts where the batch has no labels.
        reduce: see `DepthSearch`.

    Raises:
        MLFSError: no batch.
    """
    model, full, dims = supernet.model, supernet.space.max, supernet.dimensions
    used = _leading(batches, model.device)
    measure = loss_of if loss_of is not None else functools.partial(loss_on, model)
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad(), supernet.activate(full):
            targets = [None if has_labels(batch) else _targets(model, batch, i) for i, batch in enumerate(used)]

            def run(i: int, kept: tuple[int, ...]) -> Tensor:
                with supernet.activate_sizes(dims.layer_sizes(replace(full, layers=kept))):
                    return measure(used[i], targets[i])

            yield DepthSearch(supernet.layers, run, [batch.get("attention_mask") for batch in used], reduce)
    finally:
        model.train(was_training)


def _leading(batches: Iterable[Mapping[str, Any]], device: torch.device) -> list[dict[str, Any]]:
    """Takes the batches that are enough to tell depths apart."""
    used: list[dict[str, Any]] = []
    for batch in itertools.islice(batches, BATCHES):
        used.append(on_device(batch, device))
        if sum(map(_predictions, used)) >= PREDICTIONS:
            break
    if not used:
        raise MLFSError("no batch to rank the layers on: the calibration data is empty")
    return used


def _targets(model: PreTrainedModel, batch: Mapping[str, Any], seed: int) -> OwnTargets:
    """Makes targets for a batch from what the whole model predicts: drawn, if the predictions take much memory."""
    outputs = model(**batch)
    size = sum(value.numel() for value in outputs.values() if isinstance(value, Tensor))
    generator = torch.Generator().manual_seed(seed) if size > MOST_PREDICTIONS else None
    return OwnTargets(outputs, batch.get("attention_mask"), model.config.problem_type, generator)


def _predictions(batch: Mapping[str, Any]) -> int:
    """Counts the labels of a batch; without any, its rows."""
    labels = [value for name, value in batch.items() if name in LABELS and isinstance(value, Tensor)]
    tensors = [value for value in batch.values() if isinstance(value, Tensor) and value.dim()]
    return labels[0].numel() if labels else tensors[0].shape[0]
