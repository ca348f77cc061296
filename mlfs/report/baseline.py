"""Compares what sizes score with an answer that does not look at its input."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

CHANGES = "train longer (num_train_epochs), with another learning_rate, or on more data"


@dataclass(frozen=True)
class Baseline:
    """States what always answering the same scores.

    Attributes:
        metric: the metric it is stated in. value: its score. margin: by how much a score must be above it to be clearly
            better: two standard errors of it.
        answer: what is always answered.
    """

    metric: str
    value: float
    margin: float
    answer: str

    def __str__(self) -> str:
        return f"always answering {self.answer} scores {self.value:.4g} ({self.metric})"

    def not_beaten(self, rows: Sequence[dict[str, Any]]) -> list[str]:
        """Names the rows of a table of results that are not clearly better."""
        scores = {row["name"]: row[self.metric] for row in rows if self.metric in row}
        return [name for name, score in scores.items() if not score >= self.value + self.margin]


def baseline_of(task: str, labels: Sequence[float]) -> Baseline | None:
    """Finds the baseline of a task; None where there is none to speak of, or no labels.

    That is the share of the most frequent class, with two standard errors √(p (1 - p) / n); or a correlation of 0, with
    those of the correlation of n unrelated numbers, 1 / √n.

    Args:
        task: "classification", "regression" or "causal-lm".
        labels: of the evaluation data.

    >>> str(baseline_of("classification", [0, 1, 1, 1]))
    'always answering the most frequent class scores 0.75 (accuracy)'
    """
    count = len(labels)
    if not count or task not in ("classification", "regression"):
        return None
    if task == "regression":
        return Baseline("pearson", 0.0, 2 / math.sqrt(count), "one number")
    share = Counter(labels).most_common(1)[0][1] / count
    return Baseline("accuracy", share, 2 * math.sqrt(share * (1 - share) / count), "the most frequent class")


def warning(baseline: Baseline, rows: Sequence[dict[str, Any]]) -> str | None:
    """Says which sizes are not clearly better than the baseline, and what to change; None where all are."""
    names = baseline.not_beaten(rows)
    if not names:
        return None
    return f"WARNING: not clearly better than {baseline.answer}: {', '.join(names)}; {CHANGES}"
