"""Each test of the compiled operators runs in every instruction set that this processor has."""

import pytest
import torch

from mlfs.ops.backend import use_backend
from tests.csrc.helpers import BEST, cpu


@pytest.fixture(autouse=True, scope="module", params=[0, 1, 2])
def instructions(request):
    """Each instruction set in turn; a processor without it takes the next lower one, once."""
    found = cpu.limit_instructions(request.param)
    if found != ("plain", "avx2", "avx512")[request.param]:
        pytest.skip(f"this processor has {BEST} at best")
    torch.use_deterministic_algorithms(True)  # fills new tensors with NaN, too
    with use_backend("cpp"):
        yield found
    torch.use_deterministic_algorithms(False)
    cpu.limit_instructions(2)
