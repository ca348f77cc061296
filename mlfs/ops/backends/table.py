"""The table of implementations: backend × operator. A backend is one file beside this one, which fills its column.

An implementation is a function of 2-d tensors and the values of `mlfs.ops.layer`; all of one operator have the same
parameters, and each operator's own file says what they are, where its reference stands. An implementation that does not
take what it is given returns NotImplemented, as Python's own operators do; the reference then runs.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import Tensor

Others = Sequence[Tensor | None]
Function = TypeVar("Function", bound=Callable[..., Any])


@dataclass(frozen=True)
class Backend:
    """What is asked of a backend before one of its implementations runs.

    Attributes:
        name: by which MLFS_BACKEND and `use_backend` force it.
        why_not_here: why it cannot run on this machine; None if it can.
        takes: whether it runs on a tensor and others by default.
        why_not: why it cannot run on them even if it is forced; None if it can.
    """

    name: str
    why_not_here: Callable[[], str | None]
    takes: Callable[[Tensor, Others], bool]
    why_not: Callable[[Tensor, Others], str | None]


BACKENDS = {
    name: Backend(name, lambda: None, lambda x, others: True, lambda x, others: None)
    for name in ("reference", "autograd")
}
ASKED: list[Backend] = []  # in this order, whether they run on a tensor; the reference takes what none of them does
_IMPLEMENTATIONS: dict[tuple[str, str], Callable[..., Any]] = {}


def add_backend(backend: Backend) -> None:
    """Adds a backend to those that are asked, before those that are there."""
    BACKENDS[backend.name] = backend
    ASKED.insert(0, backend)


def implements(backend: str, operator: str) -> Callable[[Function], Function]:
    """Registers the function below as what `operator` is on `backend`."""

    def register(function: Function) -> Function:
        _IMPLEMENTATIONS[backend, operator] = function
        return function

    return register


def find(backend: str, operator: str) -> Callable[..., Any] | None:
    """The backend's own implementation of an operator, or None."""
    return _IMPLEMENTATIONS.get((backend, operator))
