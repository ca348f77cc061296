"""How the subnets of a step are drawn: one class per strategy, found by the name that `subnet_sampling` takes."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable

import torch

from mlfs.space.search_space import SearchSpace
from mlfs.space.subnet import Subnet


class Sampling(ABC):
    """A way of drawing the subnets that see a batch beside maxnet."""

    @abstractmethod
    def draw(self, space: SearchSpace, count: int, generator: torch.Generator, depths: bool) -> list[Subnet]:
        """Draws `count` subnets of `space` (at least one).

        Args:
            generator: the only source of chance, so that a step can be repeated.
            depths: whether depths are drawn too; else all subnets have all layers.
        """


SAMPLINGS: dict[str, type[Sampling]] = {}


def register(name: str) -> Callable[[type[Sampling]], type[Sampling]]:
    """Makes a strategy known under the name that `subnet_sampling` takes."""

    def add(strategy: type[Sampling]) -> type[Sampling]:
        SAMPLINGS[name] = strategy
        return strategy

    return add


@register("sandwich")
class Sandwich(Sampling):
    """The narrowest at a random depth, then by turns one that is as wide on every axis and one drawn axis by axis."""

    def draw(self, space: SearchSpace, count: int, generator: torch.Generator, depths: bool) -> list[Subnet]:
        """Draws subnets; see `Sampling.draw`."""
        depth = int(torch.randint(len(space.layers), (1,), generator=generator)) if depths else 0
        subnets = [narrowest(space, depth)]
        for i in range(count - 1):
            draw_one = space.sample if i % 2 else space.sample_level
            subnets.append(draw_one(generator, depths))
        return subnets


@register("random")
class Random(Sampling):
    """Each drawn axis by axis."""

    def draw(self, space: SearchSpace, count: int, generator: torch.Generator, depths: bool) -> list[Subnet]:
        """Draws subnets; see `Sampling.draw`."""
        return [space.sample(generator, depths) for _ in range(count)]


def narrowest(space: SearchSpace, depth: int) -> Subnet:
    """Returns the narrowest subnet on every axis with the layers of choice number `depth`."""
    return Subnet(space.hidden[-1], space.heads[-1], space.ffn[-1], space.layers[depth])


class BatchCounter:
    """Numbers the batches of each optimizer step from 0, as they come."""

    def __init__(self) -> None:
        self._step, self._number = -1, 0

    def number_in(self, step: int) -> int:
        """Returns the number of the next batch of `step`."""
        self._number = self._number + 1 if step == self._step else 0
        self._step = step
        return self._number


def generator_of(seed: int, stage: int, step: int, batch: int) -> torch.Generator:
    """Makes the generator that draws for one batch: the same in every process, and after resuming."""
    key = f"{seed}/{stage}/{step}/{batch}"
    digest = hashlib.sha256(key.encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
