"""Computes the metrics of a task for `transformers.Trainer`, as GLUE defines them.

Source: Wang et al. 2018, arXiv 1804.07461, table 1.

Local files carry no task name, so that they get accuracy, with F1 of class 1 where there are two classes, and Matthews
correlation where one class has more than 60 % of the labels; or Pearson, Spearman and the mean squared error for
regression. For causal-lm the loss is the measure (`perplexity`), and the accuracy of the next token stands beside it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef
from transformers import EvalPrediction

from mlfs.errors import MLFSError

UNEVEN = 0.6  # the share of one class above which accuracy alone says little
ComputeMetrics = Callable[[EvalPrediction], dict[str, float]]


def compute_metrics_for(task: str, glue_name: str | None = None, num_labels: int | None = None) -> ComputeMetrics:
    """Makes the `compute_metrics` of a task: from predictions and labels (numpy arrays) to floats by name.

    Predictions are logits (N, num_labels) for classification, (N,) or (N, 1) for regression, and for causal-lm what
    `preprocess_logits_for_metrics` returns. Of a tuple (logits, hidden states, ...) the first counts. Correlations of
    constant values, which are undefined, are 0.

    Args:
        task: "classification", "regression" or "causal-lm".
        glue_name: the GLUE task, such as "cola", whose own metrics count.
        num_labels: how many classes there are; F1 is added for two.

    Raises:
        MLFSError: the task is unknown; and, from the function that is made, logits that are not finite.

    >>> metrics = compute_metrics_for("classification", num_labels=2)
    >>> metrics(EvalPrediction(np.array([[2.0, 1.0], [0.0, 3.0]]), np.array([0, 1])))
    {'accuracy': 1.0, 'f1': 1.0}
    """
    measure = _measure(task, glue_name, num_labels)

    def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
        logits = np.asarray(_first(prediction.predictions))
        labels = np.asarray(_first(prediction.label_ids))
        if not np.isfinite(logits).all():
            raise MLFSError("the model's predictions are not finite; training diverged: lower the learning rate")
        return {name: float(value) for name, value in measure(logits, labels).items()}

    return compute_metrics


def main_metric(task: str, glue_name: str | None = None) -> tuple[str, bool]:
    """Names the metric that ranks models, a key of the metrics or "loss", and tells whether greater is better.

    >>> main_metric("classification", "mrpc"), main_metric("causal-lm")
    (('f1', True), ('loss', False))
    """
    _check(task)
    if task == "causal-lm":
        return "loss", False
    if task == "regression":
        return "pearson", True
    return {"mrpc": "f1", "qqp": "f1", "cola": "matthews_correlation"}.get(glue_name or "", "accuracy"), True


def preprocess_logits_for_metrics(logits: Any, labels: torch.Tensor) -> torch.Tensor:
    """Reduces causal-lm logits to the token predicted at each place, as an evaluation would else hold all in memory.

    Args:
        logits: (batch, tokens, vocabulary), or a tuple that begins with them.
        labels: not read; `transformers.Trainer` passes them.

    Returns:
        (batch, tokens) int64 on the same device: column t is the prediction *of* token t, made from the tokens before
        it; column 0, which nothing predicts, is -100.
    """
    tokens = _first(logits).argmax(-1)
    return torch.cat([torch.full_like(tokens[:, :1], -100), tokens[:, :-1]], dim=1)


def perplexity(loss: float) -> float:
    """Computes exp of a mean cross-entropy in nats; infinite where that overflows.

    >>> perplexity(0.0), perplexity(1e6)
    (1.0, inf)
    """
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


Measure = Callable[[np.ndarray, np.ndarray], dict[str, float]]


def _measure(task: str, glue_name: str | None, num_labels: int | None) -> Measure:
    _check(task)
    if task == "causal-lm":
        return _token_accuracy
    if task == "regression":
        return _correlations if glue_name == "stsb" else _correlations_and_error
    if glue_name == "cola":
        return _matthews
    if glue_name is None:
        return _with_matthews_where_uneven(_accuracy_and_f1 if num_labels == 2 else _accuracy)
    return _accuracy_and_f1 if glue_name in ("mrpc", "qqp") else _accuracy


def _check(task: str) -> None:
    if task not in ("classification", "regression", "causal-lm"):
        raise MLFSError(f"no metrics for the task {task!r}; expected classification, regression or causal-lm")


def _first(value: Any) -> Any:
    return value[0] if isinstance(value, tuple | list) else value


def _accuracy(logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    return {"accuracy": accuracy_score(labels, logits.argmax(-1))}


def _accuracy_and_f1(logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    return {**_accuracy(logits, labels), "f1": f1_score(labels, logits.argmax(-1), pos_label=1, zero_division=0.0)}


def _with_matthews_where_uneven(measure: Measure) -> Measure:
    """Adds Matthews correlation where one class has so many of the labels that accuracy says little."""

    def measure_both(logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        found = measure(logits, labels)
        if labels.size and np.unique(labels, return_counts=True)[1].max() > UNEVEN * labels.size:
            found |= _matthews(logits, labels)
        return found

    return measure_both


def _matthews(logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    return {"matthews_correlation": matthews_corrcoef(labels, logits.argmax(-1))}


def _correlations(logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    values, targets = logits.reshape(-1).astype(np.float64), labels.reshape(-1).astype(np.float64)
    if len(values) < 2 or np.ptp(values) == 0 or np.ptp(targets) == 0:
        return {"pearson": 0.0, "spearmanr": 0.0}
    return {"pearson": pearsonr(values, targets).statistic, "spearmanr": spearmanr(values, targets).statistic}


def _correlations_and_error(logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    error = np.mean((logits.reshape(-1).astype(np.float64) - labels.reshape(-1)) ** 2)
    return {**_correlations(logits, labels), "mse": error}


def _token_accuracy(predicted: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    counted = (labels != -100) & (predicted != -100)
    return {"token_accuracy": float((predicted == labels)[counted].mean()) if counted.any() else 0.0}
