"""Evaluation: every size on every set, and that its figures at full size are plain Trainer's."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import default_data_collator

from tests.trainers import rows, trainer
from tests.training.plain import mlfs_and_plain

SETS = {"near": rows(12, 1), "far": rows(8, 2)}


def accuracy(found):
    return {"accuracy": float((np.argmax(found.predictions, -1) == found.label_ids).mean())}


@pytest.mark.parametrize("given", ["to the trainer", "to evaluate"])
def test_each_of_several_sets_is_evaluated_as_plain_trainer_does(given: str, tmp_path: Path) -> None:
    at_once = given == "to the trainer"
    ours, plain = mlfs_and_plain(
        tmp_path, "bert", "ForSequenceClassification", eval_dataset=SETS if at_once else rows(4)
    )
    ours.compute_metrics = plain.compute_metrics = accuracy
    found, expected = (t.evaluate() if at_once else t.evaluate(SETS) for t in (ours, plain))
    for name in SETS:
        for metric in ("loss", "accuracy"):
            assert found[f"eval_{name}_max_{metric}"] == pytest.approx(expected[f"eval_{name}_{metric}"], rel=1e-5)
        sizes = [found[f"eval_{name}_{size}_loss"] for size in ours.palette]
        assert found[f"eval_{name}_loss"] == pytest.approx(sum(sizes) / len(sizes))
        alone = ours.evaluate(SETS[name], metric_key_prefix=f"eval_{name}")
        assert [row["name"] for row in ours.results(found, f"eval_{name}")] == list(ours.palette)
        for key in (key for key in alone if not key.endswith("latency")):
            assert found[key] == alone[key]


def test_the_best_model_may_be_that_of_one_of_several_sets(tmp_path: Path) -> None:
    t = trainer(
        tmp_path, eval_dataset=SETS, eval_strategy="steps", eval_steps=1, save_steps=1, stage_steps=[2],
        load_best_model_at_end=True, metric_for_best_model="eval_far_loss", greater_is_better=False,
    )  # fmt: skip
    t.train()
    assert t.state.best_metric == min(entry["eval_far_loss"] for entry in t.state.log_history
                                      if "eval_far_loss" in entry and entry["stage"] == 2)  # fmt: skip


def test_an_evaluation_set_of_the_trainer_is_known_by_its_name(tmp_path: Path) -> None:
    t = trainer(tmp_path, eval_dataset=SETS)
    assert t.evaluate("far", metric_key_prefix="eval_far")["eval_far_loss"] == t.evaluate()["eval_far_loss"]


@pytest.mark.parametrize("drop_last", [False, True])
def test_every_size_sees_the_batches_that_plain_trainer_would(drop_last: bool, tmp_path: Path) -> None:
    """Also where their order is drawn anew each time, as in batches of like lengths."""
    seen: list[list[int]] = []

    def noted(examples: list[dict[str, object]]) -> dict[str, torch.Tensor]:
        seen.append([example["input_ids"][1] for example in examples])  # type: ignore[index]
        return default_data_collator(examples)

    data = rows(23, 1).map(lambda row, i: {"size": i % 5}, with_indices=True)
    ours, plain = mlfs_and_plain(
        tmp_path, "bert", "ForSequenceClassification", eval_dataset=data, per_device_eval_batch_size=4,
        train_sampling_strategy="group_by_length", length_column_name="size", dataloader_drop_last=drop_last,
    )  # fmt: skip
    ours.data_collator = plain.data_collator = noted
    orders = []
    for t in (plain, ours):
        seen.clear()
        torch.manual_seed(3)
        t.evaluate()
        orders.append([list(batch) for batch in seen])
    expected, found = orders
    assert len(expected) == (5 if drop_last else 6)
    looked_at = len(found) - len(ours.palette) * len(expected)  # before: to see what a batch looks like
    for i in range(len(ours.palette)):
        start = looked_at + i * len(expected)
        assert found[start : start + len(expected)] == expected
