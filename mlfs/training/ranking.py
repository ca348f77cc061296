"""Ranks the units by the first training batches, with the loss that training has."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from mlfs.supernet.depth import LayerMethod, rank_layers
from mlfs.supernet.importance import Method, Scores, importance
from mlfs.supernet.targets import LABELS, OwnTargets, loss_on
from mlfs.training.distributed import sum_over_processes, sum_scores
from mlfs.training.inputs import without_labels
from mlfs.training.step import SubnetTrainer


def rank_units(trainer: SubnetTrainer, method: Method, batches: Iterable[Mapping[str, Any]]) -> Scores:
    """Scores every unit of the whole model, by the loss that the trainer computes.

    Across processes, batch i of all of them counts as the one batch that a single process would have, and all get the
    same scores.

    Args:
        trainer: whose `compute_loss` is used.
        method: see `mlfs.supernet.importance`.
        batches: on the model's device.

    Raises:
        MLFSError: as `mlfs.supernet.importance.importance`.
    """
    supernet, processes = trainer.supernet, trainer.accelerator.num_processes

    def loss_of(batch: Mapping[str, Any]) -> Tensor | None:
        return _loss(trainer, batch, method)

    together = sum_over_processes if processes > 1 else None
    with supernet.activate(supernet.space.max):
        scores = importance(supernet.model, supernet.dimensions, method, batches, loss_of, together)
    if method == "gradient":
        sum_scores(scores, processes, trainer.args.device)
    return scores


def rank_depths(trainer: SubnetTrainer, method: LayerMethod, batches: Iterable[Mapping[str, Any]]) -> list[int]:
    """Ranks the layers of the whole model, by the loss that the trainer computes; the same in all processes.

    Arguments and errors: as `mlfs.supernet.depth.rank_layers`.
    """
    processes, device = trainer.accelerator.num_processes, trainer.args.device

    def reduce(values: Tensor) -> Tensor:
        return sum_over_processes(values.to(device)).cpu()

    def loss_of(batch: Mapping[str, Any], targets: OwnTargets | None) -> Tensor:
        loss = _loss(trainer, batch, "gradient", targets)
        assert loss is not None
        return loss

    return rank_layers(trainer.supernet, method, batches, loss_of, reduce if processes > 1 else None)


def _loss(
    trainer: SubnetTrainer, batch: Mapping[str, Any], method: Method, targets: OwnTargets | None = None
) -> Tensor | None:
    """Computes the loss of one batch as training does: its share of the mean over all processes' batches.

    Where there are no labels, and no loss of somebody's own to do without them, it is that against the model's own
    predictions; and where scores need no loss, there is none.

    Args:
        targets: of the whole model; by default they are drawn now, where they are needed.
    """
    model, inputs = trainer.supernet.model, dict(batch)
    processes, items = trainer.accelerator.num_processes, None
    unlabelled = not any(inputs.get(name) is not None for name in (*LABELS, *trainer.label_names))
    if unlabelled and method == "activation":
        model(**without_labels(model, inputs))
        return None
    if unlabelled and trainer.has_transformers_loss():
        generator = torch.Generator().manual_seed(trainer.args.seed)
        loss: Any = loss_on(model, without_labels(model, inputs), targets, generator)
    else:
        if processes > 1 or not trainer.has_transformers_loss():
            # a model that is told no number takes the mean, which rounds in another way
            items = trainer._get_num_items_in_batch([inputs], trainer.args.device)
        loss = trainer.compute_loss(model, inputs, num_items_in_batch=items)
    if processes == 1 or (items is not None and trainer.args.average_tokens_across_devices):
        return loss  # type: ignore[no-any-return]
    counted = _counted(trainer, batch)
    return loss * (counted / sum_over_processes(counted))  # type: ignore[no-any-return]


def _counted(trainer: SubnetTrainer, batch: Mapping[str, Any]) -> Tensor:
    """Counts what the loss of a batch is a mean over: its labels, or its rows."""
    task = trainer.task_of_batch(batch)
    targets, unlabelled = task.targets_in(batch), task.unlabelled(batch)
    if targets is not None and unlabelled is not None:
        return targets.ne(-100).sum().clamp_min(1).float()
    rows = next(value.shape[0] for value in batch.values() if isinstance(value, Tensor) and value.dim())
    return torch.tensor(float(rows), device=trainer.args.device)
