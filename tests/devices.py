"""Where a test of the kernels runs: on CPU tensors in Triton's interpreter, or compiled, on a GPU, under `-m gpu`."""

import pytest
from torch import Tensor

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
on_each_device = pytest.mark.parametrize("device", DEVICES)


def move(t: Tensor, device: str) -> Tensor:
    """Copies `t` to `device`, laid out in memory as it was."""
    last = sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True)) if t.numel() else -1
    flat = t.detach().as_strided((last + 1,), (1,))
    return flat.to(device).as_strided(t.shape, t.stride()).requires_grad_(t.requires_grad)
