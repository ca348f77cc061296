"""Means of what is logged, over the steps since the last log."""

from collections.abc import Mapping

from torch import Tensor


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

    def take(self) -> dict[str, float]:
        """Returns the means in the order of their names, and starts anew."""
        means = {name: (self.sums[name] / self.counts[name]).item() for name in sorted(self.sums)}
        self.sums, self.counts = {}, {}
        return means
