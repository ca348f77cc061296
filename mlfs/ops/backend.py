"""Which implementation of an operator runs: one small table, by device and type.

| backend     | what it is                         | runs on                                              |
| ----------- | ---------------------------------- | ---------------------------------------------------- |
| `reference` | plain PyTorch                      | any device and floating type                         |
| `autograd`  | the same, without operators of our | as `reference`; only when forced, for gradients of   |
|             | own: autograd differentiates it    | gradients                                            |
| `triton`    | the kernels of `mlfs.kernels`      | GPUs; CPU tensors in Triton's interpreter, for tests |
| `cpp`       | the extension compiled from csrc/  | CPUs, fp32 (and fp64, when forced)                   |

GPUs take `triton` for fp32, bf16 and fp16, CPUs take `cpp` for fp32, everything else takes `reference`. The environment
variable MLFS_BACKEND, read when mlfs is imported, or `use_backend` forces one. Each backend is a file of
`mlfs.ops.backends`. What is traced or transformed (see `mlfs.ops.observers`) runs as with `autograd`.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from mlfs.errors import MLFSError
from mlfs.ops.backends import table
from mlfs.ops.backends.cpp import extension as cpp
from mlfs.ops.backends.cpp import why_no_cpp
from mlfs.ops.observers import is_transformed, is_watched

__all__ = [
    "BACKENDS", "autocast_type", "backend_of", "check", "cpp", "direct_implementation", "has_implementation",
    "in_autocast_type", "run", "runs_as_operators", "use_backend", "why_no_cpp",
]  # fmt: skip

BACKENDS = tuple(table.BACKENDS)
# Of the process: a backward pass runs in threads of its own. The environment is read once: that takes its time.
_forced: str | None = os.environ.get("MLFS_BACKEND") or None


def backend_of(x: Tensor, *others: Tensor | None) -> str:
    """Names the backend for an operator on `x` and `others` (None is skipped).

    Raises:
        MLFSError: a backend is forced that cannot run on them; the message says why.
    """
    if _forced is None:  # the usual way, at every call of a layer
        for backend in table.ASKED:
            if backend.takes(x, others):
                return backend.name
        return "reference"
    check(_forced)
    reason = table.BACKENDS[_forced].why_not(x, others)
    if reason is not None:
        raise MLFSError(f"backend {_forced}: {reason}")
    return _forced


def run(operator: str, on: tuple[Tensor | None, ...], *arguments: Any) -> Any:
    """Runs an operator by the backend for the tensors `on`; by its reference, if the backend lacks it or refuses.

    Args:
        on: the tensors whose type and device decide, the first of them not None.
        arguments: of the implementations.
    """
    x, *others = on
    assert x is not None
    own = table.find(backend_of(x, *others), operator)
    # A backend need not have all operators, nor take all sizes of those that it has.
    if own is not None:
        result = own(*arguments)
        if result is not NotImplemented:
            return result
    reference = table.find("reference", operator)
    assert reference is not None, operator
    return reference(*arguments)


def runs_as_operators() -> bool:
    """Says whether operators of `torch.library` run now; else their formulas do, in plain, differentiable PyTorch."""
    return _forced != "autograd" and not is_transformed()


def has_implementation(operator: str, x: Tensor, *others: Tensor | None) -> bool:
    """Says whether an operator on these tensors runs by something other than its reference."""
    if not runs_as_operators():
        return False
    backend = backend_of(x, *others)
    return backend != "reference" and table.find(backend, operator) is not None


def direct_implementation(operator: str, x: Tensor, *others: Tensor | None) -> Callable[..., Any] | None:
    """Finds an implementation that may be called without an operator of PyTorch's between, or None.

    Such a call takes longer than a small product, and is not needed where no gradient is wanted, and nothing traces or
    watches what runs, stands in for `x` or changes its type.
    """
    if torch.is_grad_enabled() or type(x) is not Tensor or torch.compiler.is_compiling() or is_watched():
        return None
    if autocast_type(x) is not None:  # x is cast on the way to an operator
        return None
    return table.find(backend_of(x, *others), operator)


def autocast_type(x: Tensor) -> torch.dtype | None:
    """What autocast computes in where x is, or None outside of it (always on devices that have none, as `meta`)."""
    device = x.device.type
    if _has_autocast(device) and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return None


@torch.compiler.assume_constant_result  # PyTorch 2.11 cannot trace the question
def _has_autocast(device: str) -> bool:
    return torch.amp.is_autocast_available(device)


def in_autocast_type(x: Tensor) -> Tensor:
    """x as autocast has it go into a product; x itself where autocast is off."""
    return x.to(autocast_type(x) or x.dtype)


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Forces a backend inside the block, in the whole process."""
    global _forced
    check(name)
    previous, _forced = _forced, name
    try:
        yield
    finally:
        _forced = previous


def check(name: str) -> None:
    """Raises MLFSError if there is no such backend, or it cannot run here."""
    if name not in table.BACKENDS:
        raise MLFSError(f"backend {name!r}: expected one of {', '.join(table.BACKENDS)}")
    reason = table.BACKENDS[name].why_not_here()
    if reason is not None:
        raise MLFSError(f"backend {name} is not available: {reason}")
