"""Sums over processes."""

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


def without_sync(model: nn.Module) -> contextlib.AbstractContextManager[Any]:
    """Keeps DistributedDataParallel from summing gradients inside the block. A subnet leaves parameters out, which it
    does not expect: `average_gradients` sums them once the step's subnets have all run."""
    if hasattr(model, "no_sync"):
        return model.no_sync()  # type: ignore[operator, no-any-return]
    return contextlib.nullcontext()


def average_gradients(parameters: Sequence[nn.Parameter], processes: int) -> None:
    """Makes each gradient the mean over the processes; one that is missing counts as zero."""
    if processes == 1:
        return
    gradients = []
    for parameter in parameters:
        gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        gradients.append(gradient.reshape(-1))
    flat = torch.cat(gradients)  # one message for all
    dist.all_reduce(flat)
    flat /= processes
    lengths = [parameter.numel() for parameter in parameters]
    for parameter, gradient in zip(parameters, flat.split(lengths), strict=True):
        parameter.grad = gradient.view_as(parameter).clone()


def average(values: Tensor, processes: int) -> Tensor:
    """Returns the mean of a tensor over the processes."""
    total = values.clone()
    dist.all_reduce(total)
    return total / processes


def sum_over_processes(values: Tensor) -> Tensor:
    """Returns the sum of a tensor over the processes."""
    total = values.clone()
    dist.all_reduce(total)
    return total


def of_first_process(values: Tensor) -> Tensor:
    """Returns the tensor that the first process has."""
    first = values.clone()
    dist.broadcast(first, src=0)
    return first


def sum_scores(scores: dict[Any, Tensor], processes: int, device: torch.device) -> None:
    """Makes each tensor of `scores` the sum over the processes, in place: each ranked units by batches of its own, and
    all need one order."""
    if processes == 1:
        return
    for key in sorted(scores, key=str):
        total = scores[key].to(device)
        dist.all_reduce(total)
        scores[key] = total.cpu()
