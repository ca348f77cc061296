"""Modules of a model that follow the active subnet: their attributes, whether they run, and their forward pass.

`follow` swaps the class of such a module, once, for a subclass of its own class and of `FollowsSubnet`; `settle` swaps
it back on a copy that is extracted. The subclass is made at run time, so that the module stays what it was to everyone
else (isinstance, names, hooks). No name leads to such a class, so a pickle says what it is made of, and whoever reads
it makes the class anew.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mlfs.elastic.scope import Scope
from mlfs.errors import MLFSError
from mlfs.models.caches import fit_caches, keep_caches_in_step
from mlfs.space.dimensions import AxisSize, LayerSizes, RowSizes

Forward = Callable[..., Any]  # a forward pass: of a module and its inputs


class FollowsSubnet:
    """A module of a model that follows the active subnet: the mark of every class that `follow` makes."""

    _own_class: type[nn.Module]  # the class the module had, and will have when it is settled
    _made_of: tuple[Any, ...]  # the arguments of `_following_class`
    _following: "_Following"

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        own_class, forward, attributes, is_layer = self._made_of
        return _new_following, (own_class, getattr(forward, "remake", forward), attributes, is_layer), vars(self)


class _Following(NamedTuple):
    """What a module takes from the active subnet."""

    scope: Scope
    attributes: Mapping[str, AxisSize]
    layer: int | None


def follow(
    module: nn.Module,
    scope: Scope,
    attributes: Mapping[str, AxisSize],
    forward: Forward | None = None,
    layer: int | None = None,
) -> None:
    """Makes `module` follow the active subnet of `scope`.

    Args:
        attributes: those of its attributes whose value the active subnet gives; read anew for every thread that asks.
        forward: a forward pass in place of the module's own, such as a fused one; None: its own.
        layer: the number of the layer that the module is, which a subnet may leave out; None: it is no layer.

    Raises:
        MLFSError: the module follows a subnet already.
    """
    own_class: Any = type(module)
    if issubclass(own_class, FollowsSubnet):
        raise MLFSError(f"this {own_class.__name__} follows a subnet already")
    made = _following_class(own_class, forward, tuple(attributes), layer is not None)
    module.__dict__["_following"] = _Following(scope, attributes, layer)
    module.__class__ = made  # type: ignore[assignment]


def scope_of(module: nn.Module) -> Scope:
    """Returns the scope whose active subnet `module` follows. Raises MLFSError if it follows none."""
    if not isinstance(module, FollowsSubnet):
        raise MLFSError(f"this {type(module).__name__} follows no subnet")
    return module._following.scope


def settle(module: nn.Module, sizes: LayerSizes) -> None:
    """Undoes `follow` on a copy of the module: gives it the class it had, and its attributes their values under
    `sizes`. Does nothing to a module that follows no subnet."""
    if not isinstance(module, FollowsSubnet):
        return
    following: _Following = module.__dict__.pop("_following")
    module.__class__ = module._own_class  # type: ignore[assignment]
    for name, size in following.attributes.items():
        setattr(module, name, size(sizes))


def remade_by(forward: Forward, build: Callable[..., Forward], *values: Any) -> Forward:
    """Notes on a forward pass that another process makes the like of it by `build(*values)`, which a pickle can state.

    Returns:
        `forward`. Without the note a pickle names it as a function of its module, which one made at run time is not.
    """
    forward.remake = functools.partial(build, *values)  # type: ignore[attr-defined]
    return forward


def _new_following(own_class: Any, forward: Forward | None, attributes: tuple[str, ...], is_layer: bool) -> nn.Module:
    """Makes a module that follows, as yet without its state: the first half of reading a pickle."""
    if isinstance(forward, functools.partial):
        forward = forward()
    return object.__new__(_following_class(own_class, forward, attributes, is_layer))


@functools.cache
def _following_class(
    own_class: type[nn.Module], forward: Forward | None, attributes: tuple[str, ...], is_layer: bool
) -> type[nn.Module]:
    """Makes the class of modules that follow, one for all modules that need the same."""
    namespace: dict[str, Any] = {name: _size_property(name) for name in attributes}
    namespace["_made_of"] = (own_class, forward, attributes, is_layer)
    if is_layer:
        namespace["__call__"] = _call_or_skip
        forward = _under_its_subnet(forward or own_class.forward)
    if forward is not None:
        namespace["forward"] = functools.wraps(own_class.forward)(forward)
    namespace |= {"_own_class": own_class, "__module__": own_class.__module__, "__doc__": own_class.__doc__}
    return type(own_class.__name__, (FollowsSubnet, own_class), namespace)


def _size_property(name: str) -> property:
    def read(self: FollowsSubnet) -> int:
        scope, attributes, _ = self._following
        return attributes[name](scope.sizes)

    def write(self: FollowsSubnet, value: int) -> None:
        self.__dict__[name] = value

    return property(read, write)


def _call_or_skip(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Runs the layer, or returns its input where the subnet leaves the layer out."""
    scope, _, layer = self._following
    scope.check_known()
    if layer == 0:  # so that parts that are called on their own have it too
        scope.refresh_record()
    sizes = scope.sizes
    given = (*args, *kwargs.values())
    if not sizes.keeps(layer):
        keep_caches_in_step(given, hidden_states, layer)
        return hidden_states
    fit_caches(given, layer, sizes.of_layer["kv_heads"][layer], sizes.head_dim)
    if self.training and getattr(self, "gradient_checkpointing", False):
        kwargs["_sizes"] = sizes
    out = type(self)._own_class.__call__(self, hidden_states, *args, **kwargs)
    if isinstance(sizes, RowSizes):
        return _skip_rows(out, hidden_states, sizes, layer)
    return out


def _skip_rows(out: Tensor, hidden_states: Tensor, sizes: RowSizes, layer: int) -> Tensor:
    """Returns `out`, with the layer's input (both (batch, tokens, hidden)) in the rows whose subnet leaves it out."""
    kept = tuple(row.keeps(layer) for row in sizes.rows)
    if all(kept):
        return out
    mask = _mask(kept, out.device)
    return torch.where(mask.view(-1, *(1 for _ in out.shape[1:])), out, hidden_states)


def _mask(kept: tuple[bool, ...], device: torch.device) -> Tensor:
    """Returns `kept` on the device; copied there once, as nothing may be while a CUDA graph is recorded."""
    if torch.compiler.is_compiling():
        return torch.tensor(kept, device=device)
    return _remembered_mask(kept, device)


@functools.lru_cache(maxsize=1024)
def _remembered_mask(kept: tuple[bool, ...], device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # autograd keeps it for the backward pass of later calls
        return torch.tensor(kept, device=device)


def _under_its_subnet(layer_forward: Forward) -> Forward:
    """Wraps a layer's forward pass, which gradient checkpointing may run again, later and in another thread: it then
    runs under the subnet of the first time."""

    def forward(self: Any, *args: Any, _sizes: LayerSizes | None = None, **kwargs: Any) -> Any:
        if _sizes is None:
            return layer_forward(self, *args, **kwargs)
        with self._following.scope.activate(_sizes):
            return layer_forward(self, *args, **kwargs)

    return forward
