"""Gives a super-transformer's record to all processes of DistributedDataParallel, which gives them the parameters."""

from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from mlfs.errors import MLFSError
from mlfs.supernet.record import Record


def share_records(wrapper: nn.Module, name: str, submodule: Any) -> None:
    """Gives the records in `submodule` to all processes, where `wrapper` is DistributedDataParallel being made.

    Is called for every module that is put into another. DistributedDataParallel would send the record with every
    forward pass, too, if it were not told to leave it out.

    Raises:
        MLFSError: the super-transformers of the processes have other options, or only some of them are rotated.
    """
    if not isinstance(wrapper, DistributedDataParallel) or not isinstance(submodule, nn.Module):
        return
    for path, module in submodule.named_modules():
        if isinstance(module, Record) and not module.trained_stages.is_meta:
            wrapper.parameters_to_ignore |= {f"{path}.{key}" for key in module._buffers}
            _share(module, wrapper.process_group)


def _share(record: Record, group: Any) -> None:
    """Gives all processes the record of the first."""
    record.look()
    record.write()
    first = dist.get_global_rank(group, 0)
    numbers = torch.tensor(record.rotation.numel(), device=record.rotation.device)
    dist.broadcast(numbers, src=first, group=group)
    if numbers != record.rotation.numel():
        raise MLFSError(
            "the super-transformers of some processes are rotated, of others not: load or rotate it in all of them"
        )
    own = record.settings.clone()
    for buffer in record.buffers():  # the settings are the first
        if not buffer.numel():
            continue
        dist.broadcast(buffer, src=first, group=group)
        if not own.equal(record.settings):
            raise MLFSError("the processes hold super-transformers with other options: make them alike in all of them")
    record.read()
