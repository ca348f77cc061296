"""What a super-transformer knows of its run, which is read from its record wherever somebody asks."""

import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from mlfs.elastic.guard import Guarded
from mlfs.elastic.staged import Staged
from mlfs.space.dimensions import LayerSizes
from mlfs.space.subnet import Subnet
from mlfs.supernet.base import as_in_base, changed_parameters
from mlfs.supernet.fingerprint import Fingerprint, fingerprint
from mlfs.supernet.permutation import Permutation
from mlfs.supernet.record import NAME, Record

# What does not depend on the record, or is asked for with every forward pass, which reads the record itself.
UNRECORDED = {
    "activate", "activate_rows", "activate_sizes", "active", "bound", "forward", "has_row_sizes", "is_exportable",
    "kept_layers", "layer_sizes", "layers", "merged_stages", "record", "why_not_exportable",
}  # fmt: skip
_GLANCED = {"count_parameters", "count_trainable"}  # in each step of training, where a GPU would be waited for

Class = TypeVar("Class", bound=type)


class Recorded(Guarded):
    """Holds what the record says of a super-transformer, as plain values.

    Attributes:
        permutation: the order of the units, against the base.
        rotation: (hidden, hidden) float32 on the CPU, what the base's residual stream was rotated by before heads and
            feed-forward units were ordered; the permutation has no entry for hidden then. None if it was not.
        new_parameters: names of parameters that are not as in the base's checkpoint, and so belong to the run.
        base_vocabulary: how many tokens the base has; None if it is as many as the model.
    """

    _fingerprint: Fingerprint | None
    _layer_sizes: dict[Subnet, LayerSizes]  # those that were asked for

    @property
    def permutation(self) -> Permutation:
        look(self)
        return self._permutation

    @permutation.setter
    def permutation(self, value: Permutation) -> None:
        self._permutation = value
        self._layer_sizes = {}  # a number of layers may stand for others now

    @property
    def rotation(self) -> Tensor | None:
        look(self)
        return self._rotation

    @rotation.setter
    def rotation(self, value: Tensor | None) -> None:
        self._rotation = value

    @property
    def new_parameters(self) -> set[str]:
        look(self)
        return self._new_parameters

    @new_parameters.setter
    def new_parameters(self, value: set[str]) -> None:
        self._new_parameters = value

    @property
    def base_vocabulary(self) -> int | None:
        look(self)
        return self._base_vocabulary

    @base_vocabulary.setter
    def base_vocabulary(self, value: int | None) -> None:
        self._base_vocabulary = value

    @property
    def record(self) -> Record:
        """What a state dict says of the run beside its tensors."""
        return cast(Any, self).model.get_submodule(NAME)  # type: ignore[no-any-return]

    @property
    def trained_stages(self) -> int:
        """How many stages have ever trained; later ones have no effect yet."""
        look(self, effects=True)
        modules = cast(Any, self).model.modules()
        return max((m.trained_stages for m in modules if isinstance(m, Staged)), default=0)

    def fingerprint(self) -> Fingerprint:
        """Hashes each base parameter as it was loaded, in fp32, bf16 and fp16: once, before anything is reordered.

        What is not as where the base came from then belongs to the run, which is said (`changed_parameters`).
        """
        look(self)
        if self._fingerprint is None:
            supernet = cast(Any, self)
            if changed := changed_parameters(supernet):
                self.new_parameters = self.new_parameters | changed
            base = as_in_base(supernet.base_parameters(), supernet.model, self.base_vocabulary)
            self._fingerprint = fingerprint(base)
            if changed:
                self.record.write()
        return self._fingerprint

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        show_record(self)


def look(supernet: Any, effects: bool = False) -> None:
    """Reads the record of a super-transformer, if it has one yet and somebody else has changed it.

    Args:
        effects: whether to count stages that have an effect too; see `Record.count_effects`.
    """
    if torch.compiler.is_compiling():
        return
    record = _record_of(supernet)
    if record is not None:
        record.look()
        if effects:
            record.count_effects()


def reads_record_first(own_class: Class) -> Class:
    """Makes every public method and property of a class read the record before it does anything, but `UNRECORDED`."""
    for name, value in list(vars(own_class).items()):
        if name.startswith("_") or name in UNRECORDED:
            continue
        if isinstance(value, property):
            setattr(own_class, name, property(_reading(value.fget, name), value.fset, value.fdel))
        elif callable(value):
            setattr(own_class, name, _reading(value, name))
    return own_class


def show_record(supernet: Any) -> None:
    """Lets the layers of a super-transformer find its record, once both are there: a copy gets them one by one."""
    record = None if supernet is None else _record_of(supernet)
    if record is not None and (scope := vars(supernet).get("_scope")) is not None:
        scope.record = record


def _record_of(supernet: Any) -> Any:
    model = vars(supernet).get("_modules", {}).get("model")
    return None if model is None or "_modules" not in vars(model) else getattr(model, NAME, None)


def _reading(method: Any, name: str) -> Callable[..., Any]:
    @functools.wraps(method)
    def reads_first(self: Any, *args: Any, **kwargs: Any) -> Any:
        if name in _GLANCED and (record := _record_of(self)) is not None:
            record.refresh()
        else:
            look(self, effects=True)
        return method(self, *args, **kwargs)

    return reads_first
