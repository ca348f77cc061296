"""The options of training: what is refused, and how."""

import json
from pathlib import Path
from typing import Any

import pytest

from mlfs import MLFSError
from mlfs.training.arguments import passes_over
from mlfs.training.execution import EXECUTIONS
from mlfs.training.sampling import SAMPLINGS
from tests.trainers import rows, trainer


@pytest.mark.parametrize("options,message", [
    ({"stages_to_train": [1, 0]}, "ascending"), ({"stage_epochs": [1.0, 2.0]}, "one for each"),
    ({"stage_steps": [0]}, "positive"), ({"distill_alpha": 1.5}, "distill_alpha"), ({"gamma": -1}, "gamma"),
    ({"subnets_per_step": 0}, "subnets_per_step"), ({"order": "best"}, "order"), ({"palette": "{"}, "JSON"),
    ({"palette": '{"x": {"hidden": 47, "heads": 6, "ffn": 40, "layers": [0]}}'}, "outside the space"),
    ({"train_base": 0}, "list of stages"), ({"base_learning_rate": -1}, "positive"),
    ({"learning_rate": -1}, "at least"), ({"base_learning_rate": float("inf")}, "finite"),
    ({"num_train_epochs": -3}, "-1 for a default"),
    ({"distill_beta": [0.1, 0.2]}, "4 layers"), ({"temperature": 0.0}, "temperature"),
])  # fmt: skip
def test_bad_option_is_refused_with_its_name(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(MLFSError, match=message):
        trainer(tmp_path, **options)


@pytest.mark.parametrize("option, known", [("subnet_sampling", SAMPLINGS), ("subnet_execution", EXECUTIONS)])
def test_an_unknown_name_is_refused_with_those_that_are_registered(option: str, known: Any, tmp_path: Path) -> None:
    with pytest.raises(MLFSError, match=f"{option}='best': expected one of {', '.join(known)}"):
        trainer(tmp_path, **{option: "best"})


@pytest.mark.parametrize(("examples", "passes"), [
    (None, 3), (0, 3), (1, 20), (1000, 20), (2490, 13), (3668, 9), (8551, 4), (10_000, 3), (67_349, 3),
])  # fmt: skip
def test_few_examples_take_many_passes(examples: int | None, passes: int) -> None:
    assert passes_over(examples) == passes


def test_passes_are_by_the_number_of_examples_unless_they_are_given(tmp_path: Path) -> None:
    lengths = {}
    for name, options in {
        "by size": {}, "given": {"num_train_epochs": 2.0}, "of stages": {"stage_epochs": [1.0, 2.0, 3.0]},
    }.items():  # fmt: skip
        t = trainer(tmp_path / name, stage_steps=[], save_strategy="no", train_dataset=rows(8), **options)
        t.train()
        states = [json.loads((tmp_path / name / f"stage-{s}" / "trainer_state.json").read_text()) for s in range(3)]
        lengths[name] = [state["max_steps"] for state in states]
        assert t.args.num_train_epochs == options.get("num_train_epochs", -1)
    assert lengths == {"by size": [40, 40, 40], "given": [4, 4, 4], "of stages": [2, 4, 6]}


@pytest.mark.parametrize(("options", "rates"), [
    ({}, [1e-3, 3e-3, 3e-3]), ({"subnet_rate_factor": 2.0}, [1e-3, 2e-3, 2e-3]),
    ({"stage_learning_rates": [1e-4]}, [1e-4] * 3), ({"stage_learning_rates": [1e-4, 2e-4, 3e-4]}, [1e-4, 2e-4, 3e-4]),
    ({"train_base": [0, 2], "base_learning_rate": 1e-4}, [1e-4, 3e-3, 3e-4]),
])  # fmt: skip
def test_smaller_sizes_train_at_a_higher_rate(options: dict[str, Any], rates: list[float], tmp_path: Path) -> None:
    settings = {"subnet_rate_factor": 3.0, "learning_rate": 1e-3, "stage_steps": [1], "logging_steps": 1}
    t = trainer(tmp_path, save_strategy="no", **{**settings, **options})
    t.train()
    assert [e["learning_rate"] for e in t.state.log_history if "loss" in e] == pytest.approx(rates)
    assert t.args.learning_rate == 1e-3


def test_a_rate_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MLFSError, match="subnet_rate_factor=0"):
        trainer(tmp_path, subnet_rate_factor=0)
