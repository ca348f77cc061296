"""How much memory this process has taken."""

import resource
from pathlib import Path


def peak_memory() -> int:
    """Returns the most bytes that were resident at once, so far."""
    status = Path("/proc/self/status")
    if status.exists():  # getrusage counts what the process was forked from, too
        return 1024 * next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
