"""Compiled machine code of every kernel, run on an emulated GPU: `TINYGRAD=<checkout> pytest -m emulated`."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.emulator import missing

pytestmark = [pytest.mark.emulated, pytest.mark.skipif(missing() is not None, reason=str(missing()))]
KERNELS = ("sliced_linear", "feed_forward", "grouped", "joint", "decode", "norm", "rotary", "distill")
ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("config", [0, 1])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("kernel", KERNELS)
def test_machine_code_gives_what_the_reference_gives(kernel, dtype, config):
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    env |= {"AMDGCN_USE_BUFFER_OPS": "0", "DEV": "CPU"}  # as the emulator needs them
    command = [sys.executable, "-m", "tests.kernels.emulated_cases", kernel, dtype, str(config)]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr[-3000:]}"
