"""What losses are divided by where gradients accumulate, over batches and over processes."""

import torch

from mlfs.training.batch import Accumulation

TARGETS = torch.tensor([[1, 2, -100], [-100, 3, -100]])  # three count


def test_a_mean_over_the_batch_is_divided_by_the_number_of_batches():
    accumulation = Accumulation(None, is_scaled=False, divisor=4, processes=2)
    assert accumulation.items(TARGETS) == 3
    assert accumulation.share(TARGETS) == 1.0


def test_shares_of_all_batches_and_processes_add_up_to_one():
    """Of 12 labels in two batches of two processes, over which gradients are averaged."""
    accumulation = Accumulation(torch.tensor(12), is_scaled=True, divisor=1, processes=2)
    assert accumulation.items(TARGETS) == 6
    shares = [accumulation.share(TARGETS) for _ in range(4)]
    assert sum(shares) / 2 == 1.0


def test_a_sum_over_items_is_a_mean_times_the_share():
    accumulation = Accumulation(8, is_scaled=True, divisor=1, processes=1)
    losses = torch.tensor([0.5, 1.5, 4.0])
    torch.testing.assert_close(losses.sum() / accumulation.items(TARGETS), losses.mean() * accumulation.share(TARGETS))
