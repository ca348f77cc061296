"""What every elastic layer shares: the parameters of the layer it was made from, and the scope it follows."""

import copy
import sys
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mlfs.elastic.guard import Guarded
from mlfs.elastic.readers import multiplies_itself, tell_of_the_parameter
from mlfs.elastic.scope import Scope
from mlfs.elastic.source import check_source, share_hooks
from mlfs.errors import MLFSError
from mlfs.space.dimensions import AxisSize, LayerSizes, RowSizes
from mlfs.space.subnet import is_int


class OutputPart(NamedTuple):
    """One part of a layer's output that follows an axis: numbers `start` to `stop` of the full width."""

    size: AxisSize
    start: int
    stop: int


class Axes(NamedTuple):
    """Which axis a layer's input, and each part of its output, follow; None or nothing where the width is fixed."""

    input: AxisSize | None
    outputs: tuple[OutputPart, ...]


class Elastic(Guarded):
    """Holds what the elastic layers share: the parameters of the layer they came from, and the subnet they follow.

    `weight` and `bias` are the parameters of the layer it came from (`own_weight`, `own_bias`). Only for code that is
    known to multiply with them itself instead of calling the layer (`mlfs.elastic.readers`) they are what the layer
    computes with; anybody else asks for `computed_weight()` and `computed_bias()`.

    Attributes:
        owned: whether its own weight and bias belong to the run, as those of a task head or of a norm that trained do,
            and are saved with it.
        is_head: whether it is a head that is new for the task.
    """

    def __init__(self, module: nn.Module, made_for: type[nn.Module] | None = None) -> None:
        check_source(module, made_for)
        super().__init__()
        self.register_parameter("weight", module.weight)  # type: ignore[arg-type]
        self.register_parameter("bias", getattr(module, "bias", None))
        self.training = module.training
        share_hooks(module, self)
        self._template = (_without_parameters(module),)  # in a tuple: not a submodule
        self._scope: Scope | None = None
        self._extents: tuple[AxisSize, ...] = ()  # the axis of each fused part of the output
        self.owned = self.is_head = False

    def bind(self, scope: Scope, *extents: AxisSize) -> None:
        """Lets the active subnet of `scope` give the sizes, along one axis for each fused part."""
        self._scope, self._extents = scope, extents

    def axes(self) -> Axes:
        """Says which axes the layer follows."""
        raise NotImplementedError

    @property
    def own_weight(self) -> nn.Parameter:
        """The parameter of the layer it was made from, of its full size."""
        return self._own("weight")  # type: ignore[return-value]

    @property
    def own_bias(self) -> nn.Parameter | None:
        """The parameter of the layer it was made from, of its full size; None if it has none."""
        return self._own("bias")

    @property
    def weight(self) -> Tensor:
        """The layer's own weight; for code that multiplies with it itself, what `computed_weight` gives."""
        return self._given("weight")  # type: ignore[return-value]

    @weight.setter
    def weight(self, value: Tensor) -> None:
        vars(self)["weight"] = value  # in the parameter's place, as wrappers do that keep parameters elsewhere

    @weight.deleter
    def weight(self) -> None:
        del vars(self)["weight"]

    @property
    def bias(self) -> Tensor | None:
        """The layer's own bias, or None; for code that adds it itself, what `computed_bias` gives."""
        return self._given("bias")

    @bias.setter
    def bias(self, value: Tensor) -> None:
        vars(self)["bias"] = value

    @bias.deleter
    def bias(self) -> None:
        del vars(self)["bias"]

    def computed_weight(self) -> Tensor | None:
        """Gives the weight that the layer computes with now: the active subnet's slice, trained stages merged in.

        Gradients go through it. Made anew each time, unless it is the layer's own weight; None where there is none.

        Raises:
            MLFSError: each row of the batch has a size of its own.
        """
        return self._computed("weight")

    def computed_bias(self) -> Tensor | None:
        """Gives the bias that the layer computes with now; otherwise as `computed_weight`."""
        return self._computed("bias")

    def _given(self, name: str) -> Tensor | None:
        """What whoever reads the attribute `name` gets."""
        own = self._own(name)
        if own is None and name not in self._parameters:
            raise AttributeError(f"{type(self).__name__} has no {name}")
        # torch.compile cannot look at the caller, and has nothing but computations
        if torch.compiler.is_compiling() or multiplies_itself(reader := sys._getframe(2)):
            return self._computed(name)
        if own is not None and self._computes_with_another(name):
            tell_of_the_parameter(reader, type(self).__name__, name)
        return own

    def _computes_with_another(self, name: str) -> bool:
        """Tells whether what stands for the parameter `name` now is not the parameter."""
        return self._scope is not None and self._scope.sizes is not self._scope.default

    def _own(self, name: str) -> nn.Parameter | None:
        try:
            return self._parameters[name]
        except KeyError:
            return vars(self).get(name)

    def _computed(self, name: str) -> Tensor | None:
        """What stands for the parameter `name` now."""
        own = self._own(name)
        if own is None:
            return None
        sizes = None if self._scope is None else self._scope.sizes
        if isinstance(sizes, RowSizes):
            raise MLFSError(f"each row has a size of its own here, and a {name} one: read it inside activate(subnet)")
        return self._computed_at(name, own, sizes)

    def _computed_at(self, name: str, own: Tensor, sizes: LayerSizes | None) -> Tensor:
        """What stands for a parameter under `sizes`; None: at the full size."""
        if sizes is None or not self._extents:
            return own
        width = self._extents[0](sizes)
        return own if width == own.shape[-1] else own[..., :width]

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        if self._scope is not None and not self.is_head:
            self._scope.check_load(state_dict, prefix, args[-1])
        super()._load_from_state_dict(state_dict, prefix, *args)

    def train_base(self, trains: bool) -> None:
        """Lets the layer's own weight and bias train, or freezes them."""
        for parameter in (self.own_weight, self.own_bias):
            if parameter is not None:
                parameter.requires_grad_(trains)

    def plain(self, **parameters: Tensor | None) -> nn.Module:
        """Makes a module of the class this one was made from, holding `parameters`."""
        module = copy.copy(self._template[0])
        module._parameters = {}
        for name, value in parameters.items():
            module._parameters[name] = None if value is None else nn.Parameter(value)
        module.training = self.training
        return module

    def extract_at(self, sizes: LayerSizes) -> nn.Module:
        """Makes the plain, smaller module that computes the same as this one under `sizes`."""
        raise NotImplementedError

    def _row_sizes(self) -> RowSizes | None:
        """The active sizes, where each row of the batch has its own; else None."""
        if self._scope is None:
            return None
        sizes = self._scope.sizes
        return sizes if isinstance(sizes, RowSizes) else None

    def _size(self, asked: int | None, full: int, what: str) -> int:
        """The size that a call asks for, else the active subnet's, else the full one."""
        if asked is None:
            if self._scope is None or not self._extents:
                return full
            return self._extents[0](self._scope.sizes)
        if not is_int(asked) or not 1 <= asked <= full:
            raise MLFSError(f"{what}={asked!r}: expected 1 to {full}")
        return asked


def wants_gradient(parameter: Tensor) -> bool:
    """Tells whether a gradient of a parameter is made now: it trains, and gradients are recorded."""
    return parameter.requires_grad and torch.is_grad_enabled()


def _without_parameters(module: nn.Module) -> nn.Module:
    template = copy.copy(module)
    template._parameters = {}
    share_hooks(nn.Module(), template)  # none: what is extracted is nobody's yet
    return template
