"""What was built of csrc/: whether the extension can be used here, why not, and what to do."""

import json
import re
import warnings
from functools import cache
from pathlib import Path

import torch

RECORD = Path(__file__).parents[2] / "_cpu.json"  # setup.py writes it
REINSTALL = "pip install --force-reinstall --no-deps --no-cache-dir"  # a wheel in pip's cache is of the last install


@cache
def why_no_extension() -> str | None:
    """Says in one line why the extension cannot be used here and what to do; None where it can."""
    record = read_record()
    built_for = record.get("torch")
    if built_for and _release(built_for) != _release(torch.__version__):
        return (
            f"the extension was compiled for PyTorch {built_for}, and this is {torch.__version__}; "
            f"install mlfs again ({REINSTALL}; uv pip install --reinstall-package mlfs --no-build-isolation)"
        )
    try:
        import mlfs._cpu  # noqa: F401
    except ModuleNotFoundError:
        reason = record.get("why_not") or "mlfs runs from sources that were not built"
        advice = f"install g++ or clang++ if there is none, then mlfs again ({REINSTALL}; in a checkout, `make env`)"
        return f"the extension is not there: {reason}; {advice}"
    except ImportError as error:
        return f"the extension cannot be loaded ({error}); install mlfs again ({REINSTALL})"
    return None


def read_record() -> dict[str, str]:
    """Reads what setup.py wrote of the build: `torch`, the version compiled for, or `why_not`; empty if nothing."""
    try:
        return json.loads(RECORD.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


@cache
def warn_of_plain_pytorch(reason: str) -> None:
    """Warns, once in a process, that operators run on plain PyTorch, and why."""
    warnings.warn(
        f"mlfs computes with plain PyTorch on this CPU, which takes several times as long: {reason}. "
        "`mlfs env` shows what is active; MLFS_BACKEND=reference says that this is meant.",
        stacklevel=2,
    )


def _release(version: str) -> list[str]:
    """The part of PyTorch's version that its C++ interface changes with: "2.13.0+cu130" has ["2", "13"]."""
    return re.findall(r"\d+", version)[:2]
