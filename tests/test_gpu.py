"""`python -m bench.gpu`, all of its code but the GPU's own part, on a CPU at tiny sizes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]


def bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "bench.gpu", *arguments]
    return subprocess.run(command, cwd=ROOT, env=env | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_what_it_needs():
    done = bench("--quick")
    assert done.returncode == 2 and done.stdout == ""
    assert "needs an NVIDIA or AMD GPU and a PyTorch that sees it" in done.stderr and "Traceback" not in done.stderr


def test_help_names_the_contenders_and_hides_the_dry_run():
    done = bench("--help")
    assert done.returncode == 0 and "cuBLAS + adapters" in done.stdout and "dry" not in done.stdout


@pytest.mark.slow
def test_all_of_it_runs_and_calls_itself_no_measurement(tmp_path):
    pytest.importorskip("triton")
    pytest.importorskip("peft")
    done = bench("--dry-run", "--type", "bfloat16", "--output", str(tmp_path / "gpu.json"))
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    result = json.loads((tmp_path / "gpu.json").read_text())
    assert result["measurement"] is False and result["complete"] is False
    assert done.stdout.startswith("NOT A MEASUREMENT") and done.stdout.rstrip().endswith("mean nothing")
    assert result["correctness"]["passed"] > 0 and not result["correctness"]["wrong"]
    assert {"device", "driver", "torch", "triton", "peft", "transformers", "seed", "ceilings"} <= result.keys()
    assert [row["case"] for row in result["rows"] if row["errors"]] == []
    assert {row["section"] for row in result["rows"]} == {"kernels", "training", "decoding"}
    for row in result["rows"]:
        times = row["times"]
        assert all(t["q1"] <= t["median"] <= t["q3"] and t["median"] > 0 for t in times.values())
        assert row["ratios"].keys() == times.keys() - {"mlfs"} and len(times) > 1
        compared = {"cuBLAS + adapters", "copied slice", "PEFT"}
        assert compared <= times.keys() or not row["case"].startswith(("linear, 1", "linear, inf", "step", "token"))
