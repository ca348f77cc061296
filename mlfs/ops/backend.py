"""Which implementation of an operator runs: one small table, by device and type.

| backend     | what it is                         | runs on                                              |
| ----------- | ---------------------------------- | ---------------------------------------------------- |
| `reference` | plain PyTorch                      | any device and floating type                         |
| `triton`    | the kernels of `mlfs.kernels`      | GPUs; CPU tensors in Triton's interpreter, for tests |
| `cpp`       | the extension compiled from csrc/  | CPUs, fp32 (and fp64, when forced)                   |

GPUs take `triton` for fp32, bf16 and fp16, CPUs take `cpp` for fp32, everything else takes `reference`. The environment
variable MLFS_BACKEND, read when mlfs is imported, or `use_backend` forces one.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor

from mlfs.errors import MLFSError

BACKENDS = ("reference", "triton", "cpp")
_TRITON_TYPES = (torch.float32, torch.bfloat16, torch.float16)
_CPP_TYPES = (torch.float32, torch.float64)
# Of the process: a backward pass runs in threads of its own. The environment is read once: that takes its time.
_forced: str | None = os.environ.get("MLFS_BACKEND") or None


def backend_of(x: Tensor, *others: Tensor | None) -> str:
    """The backend for an operator on `x` and `others` (None is skipped). Raises MLFSError if a forced one cannot run,
    and says why."""
    forced = _forced
    if forced is None:
        if x.is_cuda:
            return "triton" if x.dtype in _TRITON_TYPES and _why_no_triton() is None else "reference"
        takes = x.dtype == torch.float32 and x.device.type == "cpu" and _is_one_type(x, others)
        return "cpp" if takes and why_no_cpp() is None else "reference"
    check(forced)
    if forced == "triton":
        if x.dtype not in _TRITON_TYPES:
            raise MLFSError(f"backend triton: {x.dtype} is not supported, expected one of {_TRITON_TYPES}")
        if not x.is_cuda and not _interpreted():
            raise MLFSError(
                f"backend triton: a tensor on {x.device}; move it to a GPU, or start Python with TRITON_INTERPRET=1"
            )
    if forced == "cpp":
        if x.device.type != "cpu":
            raise MLFSError(f"backend cpp: a tensor on {x.device}; move it to the CPU")
        if x.dtype not in _CPP_TYPES or not _is_one_type(x, others):
            kinds = sorted({str(t.dtype)[6:] for t in (x, *others) if t is not None})
            raise MLFSError(f"backend cpp: tensors of {', '.join(kinds)}; expected all float32, or all float64")
    return forced


def is_direct(x: Tensor, *others: Tensor | None) -> bool:
    """Whether the extension for CPUs may be called without an operator between, whose call takes longer than a small
    product: no gradient is wanted, and nothing traces, stands in for `x` or changes its type."""
    return (
        not torch.is_grad_enabled()
        and type(x) is Tensor
        and not torch.compiler.is_compiling()
        and autocast_type(x) is None
        and backend_of(x, *others) == "cpp"
    )


def autocast_type(x: Tensor) -> torch.dtype | None:
    """What autocast computes in where x is, or None outside of it (always on devices that have none, as `meta`)."""
    kind = x.device.type
    enabled = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return torch.get_autocast_dtype(kind) if enabled else None


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
    if name not in BACKENDS:
        raise MLFSError(f"backend {name!r}: expected one of {', '.join(BACKENDS)}")
    if name == "triton" and (reason := _why_no_triton()):
        raise MLFSError(f"backend triton is not available: {reason}")
    if name == "cpp" and (reason := why_no_cpp()):
        raise MLFSError(f"backend cpp is not available: {reason}")


@cache
def cpp() -> Any:
    """The compiled extension."""
    import mlfs._cpu as extension

    return extension


@cache
def why_no_cpp() -> str | None:
    """Why the extension cannot be used here; None where it can."""
    try:
        import mlfs._cpu  # noqa: F401
    except ImportError as error:
        return f"the extension was not built, or not for this PyTorch ({error}); reinstall with a C++ compiler at hand"
    return None


def _is_one_type(x: Tensor, others: Sequence[Tensor | None]) -> bool:
    return all(t is None or (t.dtype == x.dtype and t.device == x.device) for t in others)


@cache
def _why_no_triton() -> str | None:
    try:
        import triton  # noqa: F401
    except ImportError:
        return "triton is not installed (it comes with PyTorch's builds for GPUs)"
    if not torch.cuda.is_available() and not _interpreted():
        return "PyTorch sees no GPU (TRITON_INTERPRET=1 runs the kernels, slowly, on a CPU)"
    return None


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"
