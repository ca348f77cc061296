"""Means of what is logged, over the steps since the last log."""

from collections.abc import Mapping

import torch
from torch import Tensor

from mlfs.training.distributed import average


class RunningMeans:
    """Named means of scalars. They stay on their device until they are taken, so that no step waits for it."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, int] = {}

    def add(self, values: Mapping[str, Tensor], prefix: str = "") -> None:
        """Adds one value to each mean named `prefix` and its key."""
        for key, value in values.items():
            name = prefix + key
            if name in self.sums:
                self.sums[name] = self.sums[name] + value
                self.counts[name] += 1
            else:
                self.sums[name], self.counts[name] = value, 1

    def take(self, processes: int = 1) -> dict[str, float]:
        """Returns the means in the order of their names, over all processes, and starts anew."""
        names = sorted(self.sums)
        means = [(self.sums[name] / self.counts[name]).double() for name in names]
        if processes > 1 and names:
            means = list(average(torch.stack(means), processes))
        self.sums, self.counts = {}, {}
        return {name: mean.item() for name, mean in zip(names, means, strict=True)}
