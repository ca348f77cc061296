"""Turns other libraries away from what is elastic, before they have changed anything.

Quantisers look for an nn.Linear, find none, and would leave all as it is without a word. PEFT would put its adapters in
the place of elastic layers: most kinds fail there in PEFT's own words, and some (those of norms) copy the layer, which
then follows no subnet.
"""

import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook

from mlfs.errors import MLFSError


class Guarded(nn.Module):
    """Raises MLFSError where torch.ao.quantization, torchao or PEFT sets about it, and finds parameters by name."""

    @property
    def qconfig(self) -> None:
        """None; torch.ao.quantization sets it on every module before it starts."""
        return None

    @qconfig.setter
    def qconfig(self, value: object) -> None:
        raise MLFSError(self._why_not_quantised())

    def named_children(self) -> Iterator[tuple[str, nn.Module]]:
        """Gives the modules in this one; torchao walks a model by it."""
        if not torch.compiler.is_compiling():  # which cannot look at the caller
            self._turn_torchao_away(sys._getframe(1).f_globals.get("__name__"))
        return super().named_children()

    def named_modules(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Module]]:
        """Gives all modules in this one and itself; torchao walks a model by it too."""
        if not torch.compiler.is_compiling():
            self._turn_torchao_away(sys._getframe(1).f_globals.get("__name__"))
        return super().named_modules(*args, **kwargs)

    def get_parameter(self, target: str) -> nn.Parameter:
        """Finds a parameter by its name, as nn.Module does: the layer's own, also where `layer.weight` is another."""
        path, _, name = target.rpartition(".")
        try:
            found = self.get_submodule(path)._parameters.get(name)
        except AttributeError:
            found = None
        return super().get_parameter(target) if found is None else found

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Adds a parameter; torchao's own kinds of tensor have no slices such as are read here."""
        if param is not None:
            self._turn_torchao_away(type(param.data).__module__)
        super().register_parameter(name, param)

    def _turn_torchao_away(self, module: str | None) -> None:
        if module is not None and _is_of("torchao", module):
            raise MLFSError(self._why_not_quantised())

    def _why_not_quantised(self) -> str:
        kind = type(self).__name__
        return f"quantising {kind} is not supported: quantise the plain model or layer that extract(...) makes"


def why_no_peft() -> str:
    """Says what to do instead of adding PEFT's adapters."""
    return (
        "PEFT's adapters cannot be added to what is elastic, whose stages are low-rank adapters: train these "
        "(train_stage), or give PEFT the plain model that extract(subnet) makes"
    )


def _turn_peft_away(module: nn.Module, name: str, submodule: Any) -> None:
    """Is called for every module that is put into another; PEFT puts what it adapts into modules of its own."""
    if isinstance(submodule, Guarded) and _is_of("peft", type(module).__module__):
        raise MLFSError(why_no_peft())


def _is_of(package: str, module: str) -> bool:
    return module.partition(".")[0] == package


register_module_module_registration_hook(_turn_peft_away)
