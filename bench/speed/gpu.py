"""Is it right on the GPU, and how fast: correctness first, then timings, one table and one JSON file.

    python -m bench.speed.gpu                everything, to bench/results/gpu.json
    python -m bench.speed.gpu --quick        fewer cases and rounds, to see whether it runs
    python -m bench.speed.gpu --only kernels one part (correctness, kernels, training, decoding); may be repeated

Correctness is `pytest -m gpu`: all kernels and whole models against float64, on the device. If it fails, nothing is
timed. Timings are of one process: ours and the contenders take turns, CUDA events around each run; medians, with
quartiles in the JSON file.

    cuBLAS + adapters   the same operators on plain PyTorch: a product on the strided slice, then each adapter's two
    PEFT                LoRA of rank 8 on every linear layer of the model of that size
    copied slice        the slice is copied into smaller weights first, each time
    no adapter          the extracted model (training: forward and backward through frozen weights): a lower bound
    one by one          several sizes, one launch after the other

A contender's column says how many times as long as ours it takes: above 1, ours is faster. The last columns say what
share ours reaches of what the device reached in this run: the FLOP/s of a large matrix product of that type, the
bytes/s of a large copy. They count only what cannot be avoided (each operand once; of whole models, no adapters).
"""

import argparse
import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from bench.environment import environment

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "bench" / "results" / "gpu.json"
PARTS = ("correctness", "kernels", "training", "decoding")
TYPES = ("bfloat16", "float16", "float32")
NO_CLAIM = "NOT A MEASUREMENT: a dry run on a CPU, at sizes that mean nothing"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", choices=PARTS, help="default: all")
    parser.add_argument("--type", action="append", choices=TYPES, help="default: all")
    parser.add_argument("--quick", action="store_true", help="fewer cases and rounds")
    parser.add_argument("--rounds", type=int, help="how often each contender runs (default: 50; quick: 10)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="default: bench/results/gpu.json, of a whole run only")
    parser.add_argument("--dry-run", action="store_true", help=argparse.SUPPRESS)  # tiny, on a CPU, interpreted
    given = parser.parse_args(arguments)
    if given.dry_run:
        os.environ["TRITON_INTERPRET"] = "1"
    elif why := missing():
        print(f"bench.speed.gpu: {why}", file=sys.stderr)
        raise SystemExit(2)
    result = run(given)
    print(show(result))
    if failed(result):
        raise SystemExit(1)


def missing() -> str | None:
    """Says why nothing can be measured here; None if it can."""
    import torch

    if not torch.cuda.is_available():
        built = torch.version.cuda or torch.version.hip
        has = f"PyTorch {torch.__version__}, " + ("which sees none" if built else "a build without CUDA or ROCm")
        return f"needs an NVIDIA or AMD GPU and a PyTorch that sees it; here is {has}"
    if os.environ.get("TRITON_INTERPRET") == "1":
        return "TRITON_INTERPRET=1 is set, so kernels would be interpreted on the CPU: unset it"
    for name in ("triton", "peft", "pytest"):
        if find_spec(name) is None:
            return f"needs {name}: pip install {name}"
    return None


def run(given: argparse.Namespace) -> dict[str, Any]:
    """Checks, then times; writes the result after every case, so that a run that is cut off leaves what it found."""
    import torch
    from tqdm import tqdm

    from bench.speed import gpu_kernels, gpu_models
    from bench.speed.gpu_timing import Clock, measure
    from mlfs.files import write_json

    parts = given.only or list(PARTS)
    whole = not (given.only or given.type or given.quick or given.dry_run)
    output = given.output or (RESULTS if whole else None)
    device, tiny = ("cpu", True) if given.dry_run else ("cuda", False)
    torch.manual_seed(given.seed)
    result: dict[str, Any] = {
        "measurement": not tiny,
        "complete": False,
        **environment(given.seed),
        **gpu(device),
        "quick": given.quick,
        "rows": [],
    }

    def keep() -> None:
        if output is not None:
            output.parent.mkdir(parents=True, exist_ok=True)
            write_json(output, result)

    if "correctness" in parts:
        result["correctness"] = correctness(dry=tiny)
        keep()
        if result["correctness"]["wrong"]:
            print("bench.speed.gpu: wrong results on this device, so nothing is timed", file=sys.stderr)
            return result
    if set(parts) == {"correctness"}:
        return result
    rounds = given.rounds or (2 if tiny else 10 if given.quick else 50)
    clock = Clock(device, rounds, 1, 1 << 10) if tiny else Clock(device, rounds)
    dtypes = [getattr(torch, name) for name in given.type or TYPES]
    size, copied = (32, 1 << 10) if tiny else (8192, 1 << 30)
    result["ceilings"] = ceilings = clock.ceilings(dtypes, size, copied)
    clock.forget()
    lists = {"kernels": gpu_kernels.cases, "training": gpu_models.training_cases, "decoding": gpu_models.decoding_cases}
    cases = [c for part in parts if part in lists for c in lists[part](device, dtypes, tiny, given.quick or tiny)]
    for case in tqdm(cases, desc="cases", file=sys.stderr, mininterval=1.0):
        result["rows"].append(measure(case, clock, ceilings))
        clock.forget()
        keep()
    result["complete"] = whole
    keep()
    return result


def correctness(dry: bool) -> dict[str, Any]:
    """Runs `pytest -m gpu` in a process of its own and counts its tests.

    "wrong" is whether a test failed, or none ran.
    """
    command = [sys.executable, "-m", "pytest", "-q", "-rfE", "-m", "not gpu" if dry else "gpu"]
    if dry:
        command += ["tests/kernels/test_offsets.py"]
    elif find_spec("xdist") is not None:  # compiling is what takes the time
        command += ["--numprocesses", str(min(8, os.cpu_count() or 1)), "--dist", "worksteal"]
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        print("correctness: " + " ".join(command[1:]), file=sys.stderr)
        done = subprocess.run([*command, f"--junitxml={report}"], cwd=ROOT, stdout=sys.stderr)
        suites = ElementTree.parse(report).getroot().iter("testsuite") if report.exists() else ()
        counts = {"tests": 0, "failures": 0, "errors": 0, "skipped": 0}
        for suite in suites:
            for key in counts:
                counts[key] += int(suite.get(key, 0))
    passed = counts["tests"] - counts["failures"] - counts["errors"] - counts["skipped"]
    return {**counts, "passed": passed, "wrong": done.returncode != 0 or passed == 0}


def gpu(device: str) -> dict[str, Any]:
    """States of the GPU, beyond `bench.environment`, what the figures depend on: name, memory, driver, precision."""
    import peft
    import torch
    import triton

    found: dict[str, Any] = {"device": "cpu", "driver": None, "peft": peft.__version__}
    found["triton"] = triton.__version__  # AMD's build is installed under another name, which metadata do not tell
    found["float32 precision"] = torch.get_float32_matmul_precision()
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        found |= {"device": properties.name, "memory": properties.total_memory, "driver": _driver()}
        found["architecture"] = getattr(properties, "gcnArchName", None) or f"{properties.major}.{properties.minor}"
        found |= {"cuda": torch.version.cuda, "hip": torch.version.hip}
    return found


def _driver() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.splitlines()[0].strip() if done.returncode == 0 and done.stdout.strip() else None


def failed(result: dict[str, Any]) -> bool:
    """Tells whether a test or a contender failed."""
    return result.get("correctness", {}).get("wrong", False) or any(row["errors"] for row in result["rows"])


def show(result: dict[str, Any]) -> str:
    """Lays out the table, and below it what the shares are of and which contender failed at what."""
    from mlfs.report.table import table

    lines = [] if result["measurement"] else [NO_CLAIM]
    lines.append(", ".join(f"{key} {result[key]}" for key in ("device", "driver", "torch", "triton") if result[key]))
    if counts := result.get("correctness"):
        lines.append(
            f"correctness: {counts['passed']} passed, {counts['failures'] + counts['errors']} failed, "
            f"{counts['skipped']} skipped"
        )
    rows = []
    for row in (r for r in result["rows"] if "times" in r):
        ours = row["times"]["mlfs"]
        median, low, high = (f"{1e3 * ours[key]:.3f}" for key in ("median", "q1", "q3"))
        line = {"case": row["case"], "type": row["type"], "mode": row["mode"], "mlfs, ms": f"{median} [{low}, {high}]"}
        line |= {f"{name}, x": f"{ratio:.2f}" for name, ratio in row["ratios"].items()}
        line |= {f"% {key}": f"{100 * row[key]:.0f}" for key in ("of FLOP/s", "of bytes/s") if key in row}
        rows.append(line)
    if rows:
        lines += [table(_in_columns(rows)), _ceilings(result["ceilings"])]
    lines += [f"FAILED {row['case']} ({row['type']}, {row['mode']}), {name}: {why}"
              for row in result["rows"] for name, why in row["errors"].items()]  # fmt: skip
    return "\n".join(lines if result["measurement"] else [*lines, NO_CLAIM])


def _in_columns(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The shares come last, whatever contenders the first rows have."""
    keys = sorted({key: None for row in rows for key in row}, key=lambda key: key.startswith("%"))
    return [{key: row.get(key, "") for key in keys} for row in rows]


def _ceilings(ceilings: dict[str, float]) -> str:
    products = ", ".join(f"{name} {value / 1e12:.3g} TFLOP/s" for name, value in ceilings.items() if name != "bytes")
    return f"reached by a large product: {products}; by a large copy: {ceilings['bytes'] / 1e9:.4g} GB/s"


if __name__ == "__main__":
    main()
