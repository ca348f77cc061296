"""Which implementation of an operator runs: one small table, by device and type.

| backend     | what it is                         | runs on                                              |
| ----------- | ---------------------------------- | ---------------------------------------------------- |
| `reference` | plain PyTorch                      | any device and floating type                         |
| `triton`    | the kernels of `mlfs.kernels`      | GPUs; CPU tensors in Triton's interpreter, for tests |

GPUs take `triton` for fp32, bf16 and fp16, everything else takes `reference`. The environment variable MLFS_BACKEND or
`use_backend` forces one.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch
from torch import Tensor

from mlfs.errors import MLFSError

BACKENDS = ("reference", "triton")
_TRITON_TYPES = (torch.float32, torch.bfloat16, torch.float16)
_forced: str | None = None  # of the process: a backward pass runs in threads of its own


def backend_of(x: Tensor) -> str:
    """The backend for an operator whose input is `x`. Raises MLFSError if a forced one cannot run, and says why."""
    forced = _forced or os.environ.get("MLFS_BACKEND") or None
    if forced is None:
        return "triton" if x.is_cuda and x.dtype in _TRITON_TYPES and _why_no_triton() is None else "reference"
    check(forced)
    if forced == "triton":
        if x.dtype not in _TRITON_TYPES:
            raise MLFSError(f"backend triton: {x.dtype} is not supported, expected one of {_TRITON_TYPES}")
        if not x.is_cuda and not _interpreted():
            raise MLFSError(
                f"backend triton: a tensor on {x.device}; move it to a GPU, or start Python with TRITON_INTERPRET=1"
            )
    return forced


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


def autocast_type(x: Tensor) -> torch.dtype | None:
    """What autocast computes in where x is, or None outside of it (always on devices that have none, as `meta`)."""
    kind = x.device.type
    enabled = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return torch.get_autocast_dtype(kind) if enabled else None


def check(name: str) -> None:
    """Raises MLFSError if there is no such backend, or it cannot run here."""
    if name not in BACKENDS:
        raise MLFSError(f"backend {name!r}: expected one of {', '.join(BACKENDS)}")
    if name == "triton" and (reason := _why_no_triton()):
        raise MLFSError(f"backend triton is not available: {reason}")


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
