"""`python -m bench.speed.gpu`, all of its code but the GPU's own part, on a CPU at tiny sizes."""

import json
import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bench.speed.gpu_timing import Case, Clock, Contender, measure

ROOT = Path(__file__).resolve().parents[2]


def bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "bench.speed.gpu", *arguments]
    return subprocess.run(command, cwd=ROOT, env=env | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_what_it_needs():
    done = bench("--quick")
    assert done.returncode == 2 and done.stdout == ""
    assert "needs an NVIDIA or AMD GPU and a PyTorch that sees it" in done.stderr and "Traceback" not in done.stderr


def test_help_names_the_contenders_and_hides_the_dry_run():
    done = bench("--help")
    assert done.returncode == 0 and "cuBLAS + adapters" in done.stdout and "dry" not in done.stdout


@pytest.mark.soak
def test_all_of_it_runs_and_calls_itself_no_measurement(tmp_path):
    pytest.importorskip("triton")
    pytest.importorskip("peft")
    done = bench("--dry-run", "--type", "bfloat16", "--output", str(tmp_path / "gpu.json"))
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    result = json.loads((tmp_path / "gpu.json").read_text())
    assert result["measurement"] is False and result["complete"] is False
    assert done.stdout.startswith("NOT A MEASUREMENT") and done.stdout.rstrip().endswith("mean nothing")
    assert result["correctness"]["passed"] > 0 and not result["correctness"]["wrong"]
    record = {"commit", "command", "mlfs", "torch", "triton", "transformers", "peft", "machine", "seed"}
    assert record | {"device", "driver", "ceilings"} <= result.keys()
    assert [row["case"] for row in result["rows"] if row["errors"]] == []
    assert {row["section"] for row in result["rows"]} == {"kernels", "training", "decoding"}
    for row in result["rows"]:
        times = row["times"]
        assert all(t["q1"] <= t["median"] <= t["q3"] and t["median"] > 0 for t in times.values())
        assert row["ratios"].keys() == times.keys() - {"mlfs"} and len(times) > 1
        compared = {"cuBLAS + adapters", "copied slice", "PEFT"}
        assert compared <= times.keys() or not row["case"].startswith(("linear, 1", "linear, inf", "step", "token"))


def test_a_contender_that_fails_or_disagrees_is_named_and_not_timed():
    def fails() -> None:
        raise ValueError("no such kernel")

    def build() -> dict[str, Contender]:
        right = torch.ones(3)
        return {
            "mlfs": Contender(lambda: None, lambda: right),
            "same": Contender(lambda: None, lambda: right + 1e-6),
            "wrong": Contender(lambda: None, lambda: right + 1),
            "not a number": Contender(lambda: None, lambda: right * float("nan")),
            "fails": Contender(fails, lambda: right),
        }

    clock = Clock("cpu", rounds=3, warm_up=1, scratch=8)
    ceilings = {"float32": 1e9, "bytes": 1e9}
    row = measure(Case("kernels", "case", torch.float32, build, flops=1.0, bytes=2.0), clock, ceilings)
    assert row["times"].keys() == {"mlfs", "same"} and row["ratios"].keys() == {"same"}
    assert row["of bytes/s"] == pytest.approx(2 * row["of FLOP/s"])
    assert row["errors"]["fails"] == "ValueError: no such kernel"
    assert all("numbers are not ours" in row["errors"][name] for name in ("wrong", "not a number"))
    broken = measure(Case("kernels", "case", torch.float32, fails), clock, ceilings)  # type: ignore[arg-type]
    assert broken["errors"] == {"build": "ValueError: no such kernel"} and "times" not in broken


def test_on_a_gpu_contenders_take_turns_between_events_and_are_recorded_once(monkeypatch):
    """With stand-ins for what PyTorch has for GPUs: the calls and their order."""
    said: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            said.append("mark")

        def elapsed_time(self, end: "Event") -> float:
            assert said[-1] == "wait" and isinstance(end, Event)
            return 2.0

    class Graph:
        def replay(self) -> None:
            said.append("replay")

    @contextmanager
    def around(name: str):
        said.append(f"{name} (")
        yield
        said.append(")")

    stream = SimpleNamespace(wait_stream=lambda other: None)
    stand_ins = {"Event": Event, "CUDAGraph": Graph, "graph": lambda _: around("record"), "Stream": lambda: stream,
                 "stream": lambda _: around("aside"), "current_stream": lambda: stream,
                 "synchronize": lambda: said.append("wait")}  # fmt: skip
    for name, value in stand_ins.items():
        monkeypatch.setattr(torch.cuda, name, value)
    clock = Clock("cpu", rounds=2, warm_up=1, scratch=8)
    clock.device = "cuda"
    runs = {name: lambda name=name: said.append(name) for name in "ab"}
    assert clock.compare(runs) == {"a": [0.002, 0.002], "b": [0.002, 0.002]}
    assert "".join(word[0] for word in said) == "mammbm" + "mbmmam" + "w"
    said.clear()
    clock.record(runs["a"])()
    assert said == ["aside (", "a", ")", "record (", "a", ")", "replay"]
