"""Turns quantisers away: they look for an nn.Linear, and would leave what is elastic as it is without a word."""

import sys
from collections.abc import Iterator
from typing import Any

from torch import nn

from mlfs.errors import MLFSError


class NeverQuantised(nn.Module):
    """Raises MLFSError where torch.ao.quantization or torchao sets about it."""

    @property
    def qconfig(self) -> None:
        """None; torch.ao.quantization sets it on every module before it starts."""
        return None

    @qconfig.setter
    def qconfig(self, value: object) -> None:
        raise MLFSError(_cannot_be_quantised(self))

    def named_children(self) -> Iterator[tuple[str, nn.Module]]:
        """Gives the modules in this one; torchao walks a model by it."""
        self._turn_away(sys._getframe(1).f_globals.get("__name__"))
        return super().named_children()

    def named_modules(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Module]]:
        """Gives all modules in this one and itself; torchao walks a model by it too."""
        self._turn_away(sys._getframe(1).f_globals.get("__name__"))
        return super().named_modules(*args, **kwargs)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Adds a parameter; torchao's own kinds of tensor have no slices such as are read here."""
        if param is not None:
            self._turn_away(type(param.data).__module__)
        super().register_parameter(name, param)

    def _turn_away(self, caller: str | None) -> None:
        if caller is not None and caller.partition(".")[0] == "torchao":
            raise MLFSError(_cannot_be_quantised(self))


def _cannot_be_quantised(module: nn.Module) -> str:
    kind = type(module).__name__
    return f"quantising {kind} is not supported: quantise the plain model or layer that extract(...) makes"
