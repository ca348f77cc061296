"""Settings for all tests: one thread, so that times and rounding do not depend on the machine, no model hub, and
Triton's interpreter, but for `pytest -m gpu`, which runs the kernels on a GPU."""

import gc
import os
import signal
import sys

# Before Triton is imported, which the conftest.py of a folder may do before `pytest_configure` runs. Processes of xdist
# have another command line, and this environment.
if "PYTEST_XDIST_WORKER" not in os.environ and not any(
    flag == "-m" and mark.startswith("gpu") for flag, mark in zip(sys.argv, sys.argv[1:], strict=False)
):
    os.environ["TRITON_INTERPRET"] = "1"
# Before anything imports the hub's client, which reads it once.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# What cuBLAS wants to be told before torch.use_deterministic_algorithms lets it run.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import pytest
import torch
from hypothesis import HealthCheck, settings

torch.set_num_threads(1)
settings.register_profile("mlfs", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("mlfs")


@pytest.fixture(autouse=True)
def own_sigterm():
    """Ends each test with the SIGTERM handler it began with: a Trainer with `enable_jit_checkpoint` sets one when it is
    made. Processes that are forked later have it too, and a pool of them that stops its workers by SIGTERM waits on."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    if before is not None and signal.getsignal(signal.SIGTERM) != before:  # None: it was not set from Python
        signal.signal(signal.SIGTERM, before)


@pytest.fixture(autouse=True, scope="module")
def few_objects_to_look_through():
    """Leaves what is in memory when a file of tests begins out of garbage collection: Trainer collects at the beginning
    and end of each training, which took half a second among the modules that are imported."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True, scope="session")
def no_waiting_for_the_disk():
    """Lets writes return before they are on the disk, which is 24 waits a checkpoint; the machine outlives the tests.
    Those that look at the waits put their own in this place."""
    waits, os.fsync = os.fsync, lambda _: None
    yield
    os.fsync = waits


@pytest.fixture
def reference():
    """Plain PyTorch operators, which round as those of transformers do."""
    from mlfs.ops.backend import use_backend

    with use_backend("reference"):
        yield


@pytest.fixture
def poisoned_memory():
    """New memory is NaN until it is written."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def pytest_configure(config: pytest.Config) -> None:
    if _on_gpu(config):
        if os.environ.get("TRITON_INTERPRET") == "1":
            raise pytest.UsageError("TRITON_INTERPRET=1 is set, so kernels would be interpreted on the CPU: unset it")
        os.environ.setdefault("MLFS_TUNE", "0")  # tests are many small shapes
    else:
        os.environ["TRITON_INTERPRET"] = "1"  # read when the kernels are imported


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if "soak" not in config.option.markexpr:
        soaks = [item for item in items if item.get_closest_marker("soak")]
        config.hook.pytest_deselected(items=soaks)
        items[:] = [item for item in items if item not in soaks]
    if _on_gpu(config):
        return
    missing = "PyTorch sees no GPU" if not torch.cuda.is_available() else "kernels are interpreted here: run -m gpu"
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason=missing))


def _on_gpu(config: pytest.Config) -> bool:
    return config.option.markexpr.startswith("gpu") and torch.cuda.is_available()
