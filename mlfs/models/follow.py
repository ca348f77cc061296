"""Modules of a model that follow the active subnet: their attributes, whether they run, and which forward pass."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import Cache

from mlfs.elastic.scope import Scope
from mlfs.space.dimensions import AxisSize, LayerSizes, RowSizes


def settle(module: nn.Module, sizes: LayerSizes) -> None:
    """Undoes, on a copy, what made a module follow the active subnet or run fused: its class is the one it had, its
    attributes are those under `sizes`."""
    while isinstance(module, _Remade):
        original: Any = type(module)._original
        _, extents, _ = module.__dict__.pop("_follows", (None, {}, None))
        module.__class__ = original
        for attribute, extent in extents.items():
            setattr(module, attribute, extent(sizes))


class _Remade:
    """Mixed into the class of a module whose attributes, or whose running at all, depend on the active subnet, or whose
    forward pass is a fused one.

    A subclass made at run time, so that the module stays what it was to everyone else (isinstance, names, hooks) and
    a size is read for the thread that asks.
    """

    _original: type[nn.Module]


@functools.cache
def fused_class(original: type[nn.Module], forward: Callable[..., Any]) -> type[nn.Module]:
    return _subclass(original, {"forward": functools.wraps(original.forward)(forward)})


def follow(module: nn.Module, scope: Scope, extents: dict[str, AxisSize], layer: int | None = None) -> None:
    module.__dict__["_follows"] = (scope, extents, layer)
    module.__class__ = _following_class(type(module), tuple(extents), layer is not None)  # type: ignore[arg-type]


@functools.cache
def _following_class(original: type[nn.Module], attributes: tuple[str, ...], is_layer: bool) -> type[nn.Module]:
    def size(attribute: str) -> property:
        def read(self: Any) -> int:
            scope, extents, _ = self._follows
            return extents[attribute](scope.sizes)

        return property(read, lambda self, value: self.__dict__.update({attribute: value}))

    namespace: dict[str, Any] = {name: size(name) for name in attributes}
    if is_layer:
        namespace |= {"__call__": _call_or_skip, "forward": _forward_under_its_subnet(original)}
    return _subclass(original, namespace)


def _subclass(original: type[nn.Module], namespace: dict[str, Any]) -> type[nn.Module]:
    namespace |= {"_original": original, "__module__": original.__module__, "__doc__": original.__doc__}
    bases = (original,) if issubclass(original, _Remade) else (_Remade, original)
    return type(original.__name__, bases, namespace)


def _call_or_skip(self: Any, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """Runs the layer, or, where the subnet leaves it out, hands its input on."""
    scope, _, layer = self._follows
    sizes = scope.sizes
    if sizes.keeps(layer):
        if self.training and getattr(self, "gradient_checkpointing", False):
            kwargs["_sizes"] = sizes
        out = type(self)._original.__call__(self, hidden_states, *args, **kwargs)
        if isinstance(sizes, RowSizes) and not all(row.keeps(layer) for row in sizes.rows):
            kept = _mask(tuple(row.keeps(layer) for row in sizes.rows), out.device)
            out = torch.where(kept.view(-1, *(1 for _ in out.shape[1:])), out, hidden_states)
        return out
    # A key-value cache tells lengths by any layer: one number per token keeps this one in step.
    for cache in (*args, *kwargs.values()):
        if isinstance(cache, Cache):
            token = hidden_states[..., :1].detach().unsqueeze(1)
            cache.update(token, token, layer)
    return hidden_states


def _mask(kept: tuple[bool, ...], device: torch.device) -> torch.Tensor:
    """`kept` on the device; copied there once, as nothing may be while a CUDA graph is recorded."""
    return torch.tensor(kept, device=device) if torch.compiler.is_compiling() else _remembered_mask(kept, device)


@functools.lru_cache(maxsize=1024)
def _remembered_mask(kept: tuple[bool, ...], device: torch.device) -> torch.Tensor:
    with torch.inference_mode(False):  # autograd keeps it for the backward pass of later calls
        return torch.tensor(kept, device=device)


def _forward_under_its_subnet(original: type[nn.Module]) -> Any:
    """`forward` that gradient checkpointing may run again, later and in another thread, under the same subnet."""

    def forward(self: Any, *args: Any, _sizes: Any = None, **kwargs: Any) -> Any:
        if _sizes is None:
            return original.forward(self, *args, **kwargs)
        with self._follows[0].activate(_sizes):
            return original.forward(self, *args, **kwargs)

    return functools.wraps(original.forward)(forward)
