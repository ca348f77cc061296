"""What each size of a palette costs and scores."""

import time
from collections.abc import Mapping
from statistics import median
from typing import Any

import torch

from mlfs.subnet import Subnet
from mlfs.supernet import SuperTransformer


def latency(model: Any, inputs: Mapping[str, Any], repeats: int = 5) -> float:
    """Median seconds of a forward pass of `model` over `inputs`, without gradients, after one to warm up.

    On a GPU the device is waited for. A shared machine is noisy: compare figures of one table only.
    """
    device = next(model.parameters()).device
    was_training, times = model.training, []
    model.eval()
    try:
        with torch.no_grad():
            for _ in range(repeats + 1):
                start = time.perf_counter()
                model(**inputs)
                if device.type == "cuda":
                    torch.cuda.synchronize(device)
                times.append(time.perf_counter() - start)
    finally:
        model.train(was_training)
    return median(times[1:])


def size_on_disk(supernet: SuperTransformer, subnet: Subnet) -> int:
    """Bytes of the exported checkpoint's weights, in the base's own type."""
    return supernet.count_parameters(subnet) * supernet.model.dtype.itemsize


def table(rows: list[dict[str, Any]]) -> str:
    """Rows as an aligned text table; floats short, bytes and counts in millions."""

    def show(key: str, value: Any) -> str:
        if key == "parameters":
            return f"{value / 1e6:.2f} M"
        if key == "bytes":
            return f"{value / 1e6:.1f} MB"
        if key == "latency":
            return f"{value * 1e3:.1f} ms"
        return f"{value:.4g}" if isinstance(value, float) else str(value)

    keys = list(dict.fromkeys(key for row in rows for key in row))
    names = {"bytes": "size on disk"}
    cells = [[names.get(k, k) for k in keys]] + [[show(k, row[k]) if k in row else "" for k in keys] for row in rows]
    widths = [max(len(line[i]) for line in cells) for i in range(len(keys))]
    lines = ["  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip() for line in cells]
    return "\n".join([lines[0], "-" * (sum(widths) + 2 * (len(widths) - 1)), *lines[1:]])
