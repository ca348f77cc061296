"""Ranks the units by the first training batches, with the loss that training has."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from mlfs.errors import MLFSError
from mlfs.supernet.importance import Method, Scores, importance
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


def _loss(trainer: SubnetTrainer, batch: Mapping[str, Any], method: Method) -> Tensor | None:
    """Computes the loss of one batch as training does, or, where scores need none and there are no labels, nothing but
    the forward pass."""
    model, inputs = trainer.supernet.model, dict(batch)
    if method == "activation" and not any(inputs.get(name) is not None for name in trainer.label_names):
        model(**without_labels(model, inputs))
        return None
    processes, items = trainer.accelerator.num_processes, None
    if processes > 1 or not trainer.has_transformers_loss():
        # a model that is told no number takes the mean, which rounds in another way
        items = trainer._get_num_items_in_batch([inputs], trainer.args.device)
    try:
        loss: Any = trainer.compute_loss(model, inputs, num_items_in_batch=items)
    except ValueError as error:
        if "did not return a loss" not in str(error):
            raise
        raise MLFSError("the gradient score needs labels in the batches") from None
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
