"""Learned projections are treated as every other parameter that trains: gradients, clipping, optimizer, checkpoints."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from mlfs import MLFSError
from tests.trainers import assert_same, own, trainer

LEARNED: dict[str, Any] = {"projection": "learned", "dropout_stages": []}


def projections(t: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in t.distance.named_parameters()}


class Norms(TrainerCallback):
    """Keeps the norms of the gradients of projections and of the model, before each step of the optimizer."""

    def __init__(self) -> None:
        self.trainer: Any = None
        self.of_projections: list[float] = []
        self.of_all: list[float] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        found = [p.grad for p in self.trainer.distance.parameters() if p.grad is not None]
        others = [p.grad for p in model.parameters() if p.grad is not None]
        self.of_projections.append(torch.cat([g.flatten() for g in found]).norm().item())
        self.of_all.append(torch.cat([g.flatten() for g in found + others]).norm().item())


def norms_of(folder: Path, **options: Any) -> tuple[Norms, Any]:
    norms = Norms()
    t = trainer(folder, stages_to_train=[2], order="none", save_strategy="no", callbacks=[norms], **LEARNED, **options)
    norms.trainer = t
    t.train()
    return norms, t


@pytest.mark.parametrize("accumulate", [1, 2])
def test_gradients_of_a_step_are_of_that_step(accumulate: int, tmp_path: Path) -> None:
    """At a learning rate of zero, each step on the same data with the same subnets has the same gradients."""
    norms, _ = norms_of(
        tmp_path, stage_steps=[3], learning_rate=0.0, subnets_per_step=2, distill_beta=[1.0], max_grad_norm=0.0,
        per_device_train_batch_size=32 // accumulate, gradient_accumulation_steps=accumulate,
        train_sampling_strategy="sequential", palette=None, subnet_draws="step", subnet_sampling="sandwich",
    )  # fmt: skip
    first = norms.of_projections[0]
    assert first > 0 and max(norms.of_projections) < 1.5 * first


def test_they_are_clipped_with_the_rest_and_counted_in_the_norm(tmp_path: Path) -> None:
    loose, t = norms_of(tmp_path / "loose", stage_steps=[1], max_grad_norm=0.0, logging_steps=1)
    logged = [entry["grad_norm"] for entry in t.state.log_history if "grad_norm" in entry]
    assert logged == [pytest.approx(loose.of_all[0], rel=1e-5)]
    clipped, t = norms_of(tmp_path / "clipped", stage_steps=[1], max_grad_norm=0.01, logging_steps=1)
    assert clipped.of_all[0] == pytest.approx(0.01, rel=1e-3)
    assert clipped.of_projections[0] == pytest.approx(loose.of_projections[0] * 0.01 / loose.of_all[0], rel=1e-3)


@pytest.mark.parametrize("where", ["in stage 1", "after stage 1", "in stage 2"])
def test_a_resumed_run_goes_on_with_what_they_have_learned(where: str, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    options: dict[str, Any] = {"stage_steps": [4], "save_steps": 2, "learning_rate": 0.05, **LEARNED}
    whole = trainer(tmp_path / "whole", **options)
    whole.train()
    stop, step = {"in stage 1": (1, 2), "after stage 1": (2, 0), "in stage 2": (2, 2)}[where]

    class Crash(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if cut.stage == stop and state.global_step == step:
                raise KeyboardInterrupt

    cut = trainer(tmp_path / "cut", callbacks=[Crash()], **options)
    with pytest.raises(KeyboardInterrupt):
        cut.train()
    resumed = trainer(tmp_path / "cut", **options)
    resumed.train(resume_from_checkpoint=True)
    assert_same(projections(whole), projections(resumed))
    assert_same(own(whole.supernet), own(resumed.supernet))
    fresh = trainer(tmp_path / "fresh", **options)
    assert any(not torch.equal(p, projections(fresh)[name]) for name, p in projections(whole).items())


def test_a_stage_whose_projections_are_gone_is_trained_anew(tmp_path: Path) -> None:
    whole = trainer(tmp_path / "whole", stage_steps=[2], save_strategy="no", **LEARNED)
    whole.train()
    broken = tmp_path / "broken"
    trainer(broken, stages_to_train=[0, 1], stage_steps=[2], save_strategy="no", **LEARNED).train()
    (broken / "stage-1" / "projections.safetensors").unlink()
    t = trainer(broken, stage_steps=[2], save_strategy="no", **LEARNED)
    t.train(resume_from_checkpoint=True)
    assert_same(own(t.supernet), own(whole.supernet))


def test_projections_that_a_run_did_not_learn_are_not_gone_on_with(tmp_path: Path) -> None:
    trainer(tmp_path, stages_to_train=[0, 1], stage_steps=[2], save_strategy="no", projection_size=8).train()
    t = trainer(tmp_path, stage_steps=[2], save_strategy="no", **LEARNED)
    with pytest.raises(MLFSError, match=r"projections\.safetensors is missing.*resume from an earlier"):
        t.train(resume_from_checkpoint=True)
