"""The kernels compile for GPUs that are not there, and what they compile to is what it should be."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("arch", ["sm80", "sm90", "sm100", "gfx942", "gfx1100"])
def test_first_configuration_fits_spills_nothing_and_has_the_main_loop_of_a_plain_product(arch, tmp_path):
    """In a process of its own: here the kernels were imported for Triton's interpreter."""
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    output = tmp_path / "static.json"
    kernels = [word for name in ("sliced_linear", "norm", "decode") for word in ("--kernel", name)]
    command = [sys.executable, "-m", "bench.gpu_static", "--quick", "--arch", arch, *kernels, "--output", str(output)]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(output.read_text())
    names = {row[result["columns"].index("kernel")] for row in result["rows"]}
    assert {"sliced_linear._product", "sliced_linear._thin", "sliced_linear._reduce"} <= names
    assert {"norm._forward", "norm._backward", "decode._parts", "decode._sum"} <= names
