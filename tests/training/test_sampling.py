"""How the subnets of a step are drawn."""

from pathlib import Path

import pytest
import torch

from mlfs import Subnet
from mlfs.training.sampling import SAMPLINGS, BatchCounter, Sampling, register
from tests.trainers import SPACE, trainer

# By (strategy, stage): hidden/heads/ffn/layers drawn with seed 42 for batches 0 and 1 of step 7, and batch 0 of step 8.
DRAWS = {
    ("sandwich", 1): [
        "48/6/40/4 24/2/20/4 32/4/40/4 24/4/20/4 24/2/20/4",
        "48/6/40/4 24/2/20/4 32/4/40/4 24/6/20/4 32/4/40/4",
        "48/6/40/4 24/2/20/4 32/4/40/4 48/6/20/4 32/4/40/4",
    ],
    ("sandwich", 2): [
        "48/6/40/4 24/2/20/4 24/2/20/4 48/4/20/4 48/6/40/2",
        "48/6/40/4 24/2/20/4 48/6/40/2 24/2/40/4 48/6/40/2",
        "48/6/40/4 24/2/20/4 32/4/40/4 32/6/20/2 32/4/40/4",
    ],
    ("random", 1): [
        "48/6/40/4 48/2/20/4 24/2/20/4 48/6/40/4 32/2/20/4",
        "48/6/40/4 24/4/20/4 24/2/40/4 32/6/20/4 24/2/40/4",
        "48/6/40/4 48/2/20/4 48/6/40/4 24/2/20/4 32/2/40/4",
    ],
    ("random", 2): [
        "48/6/40/4 32/2/40/4 24/6/20/2 24/4/40/2 48/6/20/4",
        "48/6/40/4 24/2/40/4 32/2/20/4 24/6/20/2 32/4/40/2",
        "48/6/40/4 48/2/20/4 48/4/40/2 32/6/20/2 32/6/20/4",
    ],
}


@pytest.mark.parametrize("strategy, stage", DRAWS)
def test_a_seed_draws_the_subnets_that_it_always_drew(strategy: str, stage: int, tmp_path: Path) -> None:
    """Recorded: a run of another version, once resumed, goes on with the subnets it would have drawn."""
    t = trainer(tmp_path, subnet_sampling=strategy, subnets_per_step=5, seed=42)
    t.stage = stage
    drawn = []
    for t.state.global_step in (7, 7, 8):
        drawn.append(" ".join(str(subnet) for subnet in t.draw_subnets()))
    assert drawn == DRAWS[strategy, stage]


def test_stage_0_and_a_single_subnet_are_maxnet_alone(tmp_path: Path) -> None:
    t = trainer(tmp_path)
    assert t.stage == 0 and t.draw_subnets() == [SPACE.max]
    t.stage, t.args.subnets_per_step = 2, 1
    assert t.draw_subnets() == [SPACE.max]


def test_a_strategy_of_ones_own_is_found_by_its_name(tmp_path: Path) -> None:
    @register("smallest")
    class Smallest(Sampling):
        def draw(self, space, count, generator, depths):
            return [space.min] * count

    try:
        t = trainer(tmp_path, subnet_sampling="smallest", subnets_per_step=3)
        t.stage = 2
        assert t.draw_subnets() == [SPACE.max, SPACE.min, SPACE.min]
    finally:
        del SAMPLINGS["smallest"]


def test_batches_are_counted_anew_for_each_step() -> None:
    counter = BatchCounter()
    assert [counter.number_in(step) for step in (0, 0, 0, 1, 1, 5, 5)] == [0, 1, 2, 0, 1, 0, 1]


def test_sandwich_draws_maxnet_the_narrowest_a_level_and_an_independent_one(tmp_path) -> None:
    t = trainer(tmp_path, subnets_per_step=4)
    t.stage = 2
    drawn = []
    for step in range(300):
        t.state.global_step = step
        drawn.append(t.draw_subnets())
    assert all(subnets[0] == SPACE.max for subnets in drawn)
    narrow = {Subnet(SPACE.hidden[-1], SPACE.heads[-1], SPACE.ffn[-1], layers) for layers in SPACE.layers}
    assert {subnets[1] for subnets in drawn} == narrow
    levels = {SPACE.sample_level(torch.Generator().manual_seed(i)) for i in range(200)}
    assert {subnets[2] for subnets in drawn} == levels
    assert len({subnets[3] for subnets in drawn}) > len(levels)
    t.stage = 1
    widths = [t.draw_subnets() for t.state.global_step in range(300)]
    assert all(subnet.layers == SPACE.layers[0] for subnets in widths for subnet in subnets)
    t.args.subnet_sampling = "random"
    assert len({t.draw_subnets()[1] for t.state.global_step in range(300)}) > 2 * len(narrow)
