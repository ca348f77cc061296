"""Means of what is logged."""

import torch

from mlfs.training.means import RunningMeans


def test_each_mean_is_over_the_values_that_were_added_to_it():
    means = RunningMeans()
    means.add({"loss": torch.tensor(1.0), "kl": torch.tensor(5.0)}, prefix="min_")
    means.add({"loss": torch.tensor(4.0)}, prefix="min_")
    means.add({"loss": torch.tensor(7.0)}, prefix="max_")
    taken = means.take()
    assert taken == {"max_loss": 7.0, "min_kl": 5.0, "min_loss": 2.5}
    assert list(taken) == sorted(taken)


def test_taking_starts_anew():
    means = RunningMeans()
    means.add({"loss": torch.tensor(1.0)})
    assert means.take() == {"loss": 1.0}
    assert means.take() == {}
    means.add({"loss": torch.tensor(3.0)})
    assert means.take() == {"loss": 3.0}
