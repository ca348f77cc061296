"""Whether a size has learned anything is said beside what it scores."""

import math

import pytest

from mlfs.report.baseline import baseline_of, warning


def test_of_classes_it_is_the_share_of_the_most_frequent_one():
    found = baseline_of("classification", [2, 0, 2, 2, 1])
    assert (found.metric, found.value) == ("accuracy", 0.6)
    assert found.margin == pytest.approx(2 * math.sqrt(0.6 * 0.4 / 5))
    assert str(found) == "always answering the most frequent class scores 0.6 (accuracy)"


def test_of_numbers_it_is_no_correlation():
    found = baseline_of("regression", [0.5] * 400)
    assert (found.metric, found.value, found.margin) == ("pearson", 0.0, 0.1)


@pytest.mark.parametrize(("task", "labels"), [("classification", []), ("causal-lm", [1, 2]), ("regression", [])])
def test_there_may_be_none(task, labels):
    assert baseline_of(task, labels) is None


def test_sizes_that_are_not_clearly_better_are_named_with_what_to_change():
    baseline = baseline_of("classification", [0] * 150 + [1] * 250)  # 0.625, two standard errors are 0.048
    rows = [{"name": name, "accuracy": score} for name, score in (("max", 0.7), ("mid", 0.67), ("min", 0.625))]
    rows += [{"name": "odd", "accuracy": float("nan")}, {"name": "unmeasured", "loss": 1.0}]
    said = warning(baseline, rows)
    assert "most frequent class: mid, min, odd; train longer (num_train_epochs)" in said and "\n" not in said
    assert warning(baseline, rows[:1]) is None
