"""What the tests of the compiled operators for CPUs share: comparison with formulas in float64, and dropout's masks."""

import math

import pytest
import torch
from torch import Tensor

cpu = pytest.importorskip("mlfs._cpu", reason="the C++ extension is not built")
BEST = cpu.limit_instructions(2)
TOLERANCE = {torch.float32: 2e-5, torch.float64: 1e-11}
TYPES = pytest.mark.parametrize("dtype", TOLERANCE, ids=["fp32", "fp64"])


def close(mine: Tensor, right: Tensor, dtype: torch.dtype, scale: float = 1.0) -> None:
    """To rounding, relative to the largest number: what cancels is only as good as what it is the difference of."""
    assert mine.dtype == dtype
    assert mine.shape == right.shape
    if right.numel():
        largest = max(right.abs().amax().item(), 1.0)
        assert (mine.double() - right).abs().amax().item() <= TOLERANCE[dtype] * largest * scale


def mask_of(shape: tuple[int, ...], p: float, seed: int, dtype: torch.dtype) -> Tensor:
    rows = math.prod(shape[:-1])
    return (cpu.dropout_mask(rows, shape[-1], p, seed) > 0).to(dtype).view(shape) / (1 - p)
