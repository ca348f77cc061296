"""Where a test of the kernels runs: on CPU tensors in Triton's interpreter, or compiled, on a GPU, under `-m gpu`."""

import os

import pytest
from torch import Tensor

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
on_each_device = pytest.mark.parametrize("device", DEVICES)


def examples(count: int) -> int:
    """How many examples of an operator's sizes to draw: few where kernels are compiled, which takes seconds for nearly
    each new set of sizes."""
    return count if os.environ.get("TRITON_INTERPRET") == "1" else min(count, 6)


def move(t: Tensor, device: str) -> Tensor:
    """Copies `t` to `device`, laid out in memory as it was."""
    last = sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True)) if t.numel() else -1
    flat = t.detach().as_strided((last + 1,), (1,))
    return flat.to(device).as_strided(t.shape, t.stride()).requires_grad_(t.requires_grad)
