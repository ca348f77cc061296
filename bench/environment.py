"""Where a recorded result comes from: what was run, on which code, with which libraries, on which machine."""

import os
import platform
import shlex
import subprocess
import sys
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from mlfs.commands.environment import cpu_name, library_version

ROOT = Path(__file__).resolve().parents[1]
CODE = ("--", ".", ":!bench/results")  # what is recorded one after the other is of one commit
LIBRARIES = ("mlfs", "torch", "triton", "transformers")
# Those of the variables below that are set change what runs, or how fast.
VARIABLES = ("MLFS_BACKEND", "MLFS_TUNE", "TRITON_INTERPRET", "OMP_NUM_THREADS", "CUBLAS_WORKSPACE_CONFIG")


def environment(seed: int | None = None) -> dict[str, Any]:
    """Returns what a result's file states of its origin, as plain JSON values.

    Args:
        seed: the seed of the random numbers that the result depends on; None if it depends on none.

    Returns:
        `commit` (with "+changes" if tracked files but results differ; "unknown" outside of a checkout), `command`,
        `date` (UTC), `seed` if given, the versions of Python and of `LIBRARIES` (None: not installed), `machine` (the
        name of the CPU), `cores` that this process may use, `threads` of PyTorch and `gpu` if PyTorch was imported and
        sees one, and those of `VARIABLES` that are set.
    """
    found: dict[str, Any] = {"commit": commit(), "command": command(), "date": f"{datetime.now(timezone.utc):%F %H:%M}"}
    if seed is not None:
        found["seed"] = seed
    found["python"] = platform.python_version()
    found |= {library: library_version(library) for library in LIBRARIES}
    found |= {"machine": cpu_name(), "cores": len(os.sched_getaffinity(0))}
    # Not imported here: a bench of the CPU need not wait for it, and may want to set variables before.
    if (torch := sys.modules.get("torch")) is not None:
        found["threads"] = torch.get_num_threads()
        if torch.cuda.is_available():
            found["gpu"] = torch.cuda.get_device_name()
    found["variables"] = {name: os.environ[name] for name in VARIABLES if name in os.environ}
    return found


def commit() -> str:
    """Returns the commit, with "+changes" if tracked files but results differ; "unknown" outside of a checkout."""
    try:
        head = _git("rev-parse", "HEAD")
        return f"{head}+changes" if _git("status", "--porcelain", "--untracked-files=no", *CODE) else head
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def command() -> str:
    """Returns the command line of this process: modules as `python -m` takes them, scripts without their folder."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    program = [Path(sys.argv[0]).name] if spec is None else ["-m", spec.name.removesuffix(".__main__")]
    return shlex.join(["python", *program, *sys.argv[1:]])


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=ROOT, check=True, capture_output=True, text=True)
    return done.stdout.strip()
