"""What runs on this machine, and why: the GPUs, the backends, and which of them takes which tensors."""

import torch

from mlfs.errors import MLFSError
from mlfs.ops.backend import backend_of, cpp
from mlfs.ops.backends import table
from mlfs.ops.backends.built import read_record


def gpus() -> list[str]:
    """Names the GPUs that PyTorch sees."""
    return [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]


def backends() -> dict[str, str]:
    """Says of each backend that it can run here, or why it cannot and what to do."""
    found = {}
    for name, backend in table.BACKENDS.items():
        reason = backend.why_not_here()
        found[name] = "active" if reason is None else f"not active: {reason}"
    if found["cpp"] == "active":
        built_for = read_record().get("torch", "this PyTorch")
        found["cpp"] = f"active: {cpp().instructions()} instructions, compiled for PyTorch {built_for}"
    found["reference"] += ": plain PyTorch"
    found["autograd"] = "when forced: plain PyTorch without operators of ours, which has gradients of gradients"
    return found


def runs() -> dict[str, str]:
    """Names the backend that takes each kind of tensor, as `mlfs.ops.backend` chooses; why, where none can."""
    found = {}
    for device in ("cpu", "cuda") if gpus() else ("cpu",):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            name = f"{str(dtype).removeprefix('torch.')} on {device}"
            try:
                found[name] = backend_of(torch.empty(1, dtype=dtype, device=device))
            except MLFSError as error:
                found[name] = f"none: {error}"
    return found
