"""What every elastic layer shares: the parameters of the layer it was made from, and the scope it follows."""

import copy
from typing import NamedTuple

from torch import Tensor, nn

from mlfs.elastic.guard import Guarded
from mlfs.elastic.scope import Scope
from mlfs.elastic.source import check_source, share_hooks
from mlfs.errors import MLFSError
from mlfs.space.dimensions import AxisSize, LayerSizes, RowSizes


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

    Attributes:
        owned: whether its own weight and bias belong to the run, as those of a task head or of a norm that trained do,
            and are saved with it.
        is_head: whether it is a head that is new for the task.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None

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

    def train_base(self, trains: bool) -> None:
        """Lets the layer's own weight and bias train, or freezes them."""
        for parameter in (self.weight, self.bias):
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
        if not 1 <= asked <= full:
            raise MLFSError(f"{what}={asked}: expected 1 to {full}")
        return asked


def _without_parameters(module: nn.Module) -> nn.Module:
    template = copy.copy(module)
    template._parameters = {}
    share_hooks(nn.Module(), template)  # none: what is extracted is nobody's yet
    return template
