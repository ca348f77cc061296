"""`mlfs env`: what is active on this machine, and why."""

import json
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

LIBRARIES = ("torch", "triton", "transformers", "accelerate", "datasets", "peft")
VARIABLES = (
    "MLFS_BACKEND", "MLFS_CACHE", "MLFS_TUNE", "MLFS_NO_EXTENSION", "CI", "TRITON_INTERPRET", "OMP_NUM_THREADS",
    "CUDA_VISIBLE_DEVICES", "HF_HOME", "HF_HUB_OFFLINE",
)  # fmt: skip


def environment() -> dict[str, Any]:
    """Describes this machine as mlfs sees it, in plain JSON values.

    Returns:
        `versions` (None: not installed), `folder` of the package, `processor`, `cores` of this process, `threads` of
        PyTorch, `gpus`, `backends` (each "active ...", or why not), `runs` (the backend of each kind of tensor) and
        those of `VARIABLES` that are set.
    """
    import torch

    import mlfs
    from mlfs.ops import active

    return {
        "versions": {"mlfs": mlfs.__version__, "python": platform.python_version()}
        | {name: library_version(name) for name in LIBRARIES},
        "folder": str(Path(mlfs.__file__).parent),
        "processor": cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpus": active.gpus(),
        "backends": active.backends(),
        "runs": active.runs(),
        "variables": {name: os.environ[name] for name in VARIABLES if name in os.environ},
    }


def show(as_json: bool = False) -> str:
    """Returns the description as a table to read, or as one JSON object."""
    found = environment()
    if as_json:
        return json.dumps(found)
    lines = []
    for title, value in found.items():
        if isinstance(value, dict):
            rows = value or {"none": "set"} if title == "variables" else value
            lines += ["", title, *(f"  {name:<22}{'not installed' if it is None else it}" for name, it in rows.items())]
        else:
            shown = ", ".join(value) or "none" if isinstance(value, list) else value
            lines.append(f"{title:<24}{shown}")
    return "\n".join(lines).strip()


def cpu_name() -> str:
    """Returns the CPU's model name; where the system states none, its architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def library_version(library: str) -> str | None:
    """Returns the installed version of a library; None if it is not installed."""
    try:
        return version(library)
    except PackageNotFoundError:
        return None
