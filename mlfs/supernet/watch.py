"""Notices an optimizer that was made for another stage than the one that trains.

Stages train one after the other, each with parameters of its own. An optimizer that was given those that trained when
it was made never moves those of a later stage: its steps succeed, and nothing is learned.
"""

import weakref
from collections.abc import MutableMapping
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from mlfs.elastic.staged import Staged
from mlfs.errors import MLFSError

_WATCHED: MutableMapping[Any, int] = weakref.WeakKeyDictionary()  # the stage that no optimizer has moved yet


def watch_next_optimizer(supernet: Any) -> None:
    """Checks the steps of optimizers from now on, until one moves the stage that trains; then no more.

    A step raises MLFSError if its optimizer holds other stages of the super-transformer, or its base, and not what
    trains. One that holds neither, such as a task head's, passes.
    """
    _WATCHED.pop(supernet, None)
    if supernet.stage is not None:
        _WATCHED[supernet] = supernet.stage


def _check_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    if not _WATCHED:
        return
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    for supernet, stage in list(_WATCHED.items()):
        layers = [layer for layer in supernet.modules() if isinstance(layer, Staged) and layer.stages]
        parts = {f"stage {s}": {i for layer in layers for i in _ids_of(layer, s)} for s in range(supernet.stages)}
        drawn = {id(supernet.model.get_parameter(name)) for name in supernet.drawn_parameters}
        parts["the base"] = {id(layer.own_weight) for layer in layers} - drawn  # which trains with the head
        trains = "the base" if supernet.trains_base else f"stage {stage}"
        parts_held = [part for part, ids in parts.items() if held & ids]
        if trains in parts_held:
            del _WATCHED[supernet]
        elif parts_held:
            raise MLFSError(
                f"this {type(optimizer).__name__} holds {parts_held[0]} and not {trains}, which trains: make a new "
                f"optimizer after train_stage({stage}), or one of all of model.parameters()"
            )


def _ids_of(layer: Staged, stage: int) -> set[int]:
    return {id(layer.lora_A[stage]), id(layer.lora_B[stage])}


register_optimizer_step_pre_hook(_check_step)
