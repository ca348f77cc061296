"""What a size costs: latency, and bytes on disk."""

import time
from collections.abc import Mapping
from statistics import median
from typing import Any

import torch

from mlfs.space.subnet import Subnet
from mlfs.supernet.model import SuperTransformer


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
