"""Settings for all tests: one thread, so that times and rounding do not depend on the machine, no model hub, and
Triton's interpreter where there is no GPU."""

import os

# Before anything imports the hub's client, which reads it once.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when the kernels are imported

import pytest
from hypothesis import HealthCheck, settings

from mlfs.ops.backend import use_backend

torch.set_num_threads(1)
settings.register_profile("mlfs", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("mlfs")


@pytest.fixture
def reference():
    """Plain PyTorch operators, which round as those of transformers do."""
    with use_backend("reference"):
        yield
