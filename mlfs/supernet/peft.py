"""Turns PEFT away from what is elastic, before it has changed anything.

Its adapters would stand in the place of elastic layers: most kinds fail there with PEFT's own words, and some (those of
norms) copy the layer, which then follows no subnet.
"""

from typing import Any

from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook

from mlfs.elastic.base import Elastic
from mlfs.errors import MLFSError
from mlfs.supernet.classes import ElasticModel, Signed, refuses_peft


def _refuse_peft(module: nn.Module, name: str, submodule: Any) -> None:
    """Is called for every module that is put into another; PEFT puts what it adapts into modules of its own."""
    if type(module).__module__.partition(".")[0] == "peft" and isinstance(submodule, (ElasticModel, Signed, Elastic)):
        raise MLFSError(refuses_peft())


register_module_module_registration_hook(_refuse_peft)
