"""Which subnet is active, for the thread or task that asks."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch

from mlfs.errors import MLFSError
from mlfs.space.dimensions import LayerSizes


class Scope:
    """Holds the active sizes: per thread and task (a context variable), so that threads do not see each other's subnet.

    torch.compile cannot trace a context variable; while it traces, the sizes last entered in the process are read.
    """

    def __init__(self, default: LayerSizes) -> None:
        self.default = default
        self._active: ContextVar[LayerSizes | None] = ContextVar("mlfs_active", default=None)
        self._traced: LayerSizes = default
        self._has_run_smaller = False
        self.record: Any = None  # of the super-transformer whose layers these are; a copy of a part has none
        self._loading: list[str] | None = None

    @property
    def sizes(self) -> LayerSizes:
        """The active sizes; maxnet's where none were activated."""
        if torch.compiler.is_compiling():
            return self._traced
        return self._active.get() or self.default

    @contextmanager
    def activate(self, sizes: LayerSizes) -> Iterator[None]:
        """Makes `sizes` active until the block ends, however it ends; blocks nest.

        Raises:
            MLFSError: blocks end in another order than they began; nothing is active after that.
        """
        token, outer = self._active.set(sizes), self._traced
        self._traced = sizes
        if sizes is not self.default:
            self._has_run_smaller = True
        in_order = True
        try:
            yield
        finally:
            in_order = self._active.get() is sizes
            if in_order:
                self._active.reset(token)
                self._traced = outer
            else:
                self._active.set(None)
                self._traced = self.default
        if not in_order:
            raise MLFSError(
                "blocks of `activate` ended in another order than they began, as generators do that run by turns: "
                "activate around each call instead, or call `supernet.bound(subnet)`"
            )

    def check_known(self) -> None:
        """Raises MLFSError where checkpointing runs a forward pass again and nothing says at which size.

        That is: within a backward pass that is outside of any `activate`, after other sizes than maxnet were activated.
        """
        if not self._has_run_smaller or torch.compiler.is_compiling():
            return
        if torch._C._current_graph_task_id() != -1 and self._active.get() is None:
            raise MLFSError(
                "checkpointing runs this forward pass again, outside of the block of `activate`, so that its size is "
                "unknown: run the backward pass inside the block, or checkpoint `supernet.bound(subnet)`"
            )

    def refresh_record(self) -> None:
        """Reads what the super-transformer records of its stages, if somebody else has changed it."""
        if self.record is not None and not torch.compiler.is_compiling():
            self.record.refresh()

    def begin_load(self, errors: list[str]) -> None:
        """Notes that the whole model's state is being loaded: the one load whose list of errors is `errors`."""
        self._loading = errors

    def check_load(self, state: Mapping[str, Any], prefix: str, errors: list[str]) -> None:
        """Raises MLFSError where `state` has tensors of a layer and is not loaded into the whole model."""
        if self.record is None or errors is self._loading:
            return
        if any(name.startswith(prefix) for name in state):
            raise MLFSError(
                "the state of a part does not say what trained and in what order the units are: load the whole model's "
                "(supernet.load_state_dict), and a plain model's weights before it is made elastic"
            )

    def __reduce__(self) -> tuple[Any, ...]:
        # a copy, in this process or another, is nobody's yet: what is active belongs to a thread of this one
        return Scope, (self.default,)
