"""Measures what a size costs: latency, and bytes on disk."""

import time
from collections.abc import Mapping
from statistics import median
from typing import Any

import torch

from mlfs.space.subnet import Subnet
from mlfs.supernet.model import SuperTransformer


def latency(model: Any, inputs: Mapping[str, Any], repeats: int = 5) -> float:
    """Measures the median seconds of `repeats` forward passes without gradients, after one to warm up.

    On a GPU each pass ends when the device is done. A shared machine is noisy: compare figures of one table only.

    Args:
        model: a module, which is measured in evaluation mode.
        inputs: its keyword arguments, on its device.
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
    """Computes the bytes of the weights of the exported checkpoint, in the base's own dtype."""
    return supernet.count_parameters(subnet) * supernet.model.dtype.itemsize
