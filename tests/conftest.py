"""Settings for all tests: one thread, so that times and rounding do not depend on the machine, and no model hub."""

import os

# Before anything imports the hub's client, which reads it once.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from hypothesis import HealthCheck, settings

torch.set_num_threads(1)
settings.register_profile("mlfs", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("mlfs")
