"""What callbacks see, and what their stop ends."""

import json
import signal
from pathlib import Path
from typing import Any

import pytest
from transformers import EarlyStoppingCallback, TrainerCallback

from mlfs import SuperTransformer
from tests.tiny_models import make
from tests.trainers import assert_same, own, trainer

EVENTS = ("on_step_end", "on_evaluate", "on_log", "on_save", "on_epoch_end", "on_step_begin", "on_pre_optimizer_step")
EVERY_STEP: dict[str, Any] = {"logging_steps": 1, "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1}


class Stop(TrainerCallback):
    """Asks for the end at an event of a step; or puts a control of its own in the place of the Trainer's."""

    def __init__(self, event: str, step: int) -> None:
        self.seen: list[tuple[str, int]] = []

        def stop(args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == step:
                control.should_training_stop = True

        setattr(self, event, stop)


@pytest.mark.parametrize("event", EVENTS)
@pytest.mark.parametrize("step", [2, 3], ids=["early", "at the last step"])
def test_a_callback_that_stops_ends_the_run(event: str, step: int, tmp_path: Path) -> None:
    if event in ("on_step_begin", "on_pre_optimizer_step"):  # which come before the step is counted
        step -= 1
    if event == "on_epoch_end":
        step = 3
    t = trainer(tmp_path, stage_steps=[3], callbacks=[Stop(event, step)], per_device_train_batch_size=16, **EVERY_STEP)
    output = t.train()
    assert output.global_step <= 3 and not (tmp_path / "stage-1").exists()
    # what was trained is there, as a whole run's is
    assert json.loads((tmp_path / "log_history.json").read_text())[-1]["stage"] == 0
    for folder in (tmp_path, tmp_path / "stage-0"):
        again = SuperTransformer.from_pretrained(folder, make("bert", "ForSequenceClassification"))
        assert_same(own(t.supernet), own(again))


@pytest.mark.parametrize("event", ["on_step_end", "on_evaluate"])
@pytest.mark.parametrize("step", [2, 3], ids=["early", "at the last step"])
def test_asked_so_it_ends_the_stage_alone(event: str, step: int, tmp_path: Path) -> None:
    t = trainer(tmp_path, stage_steps=[3], callbacks=[Stop(event, step)], stop_ends="stage", **EVERY_STEP)
    assert t.train().global_step == 3 * step
    assert (tmp_path / "stage-2" / "mlfs.json").exists()


def test_without_a_stop_all_stages_run(tmp_path: Path) -> None:
    t = trainer(tmp_path, stage_steps=[3], save_strategy="no")
    assert t.train().global_step == 9
    t = trainer(tmp_path / "epochs", stage_steps=[], num_train_epochs=1.0, save_strategy="no")
    assert t.train().global_step == 24


EARLY: dict[str, Any] = {
    **EVERY_STEP, "load_best_model_at_end": True, "metric_for_best_model": "loss", "greater_is_better": False,
    "learning_rate": 1.0, "max_grad_norm": 0.0, "stage_steps": [20],
}  # fmt: skip


def test_early_stopping_ends_the_run_at_its_best(tmp_path: Path) -> None:
    t = trainer(tmp_path, callbacks=[EarlyStoppingCallback(1)], **EARLY)
    t.train()
    assert not (tmp_path / "stage-1").exists()
    state = json.loads((tmp_path / "stage-0" / "trainer_state.json").read_text())
    assert state["global_step"] < 20
    best = SuperTransformer.from_pretrained(state["best_model_checkpoint"], make("bert", "ForSequenceClassification"))
    assert_same(own(t.supernet), own(best))


def test_a_stopped_run_that_is_resumed_goes_on_with_the_next_stage(tmp_path: Path) -> None:
    trainer(tmp_path, stage_steps=[3], callbacks=[Stop("on_step_end", 2)], save_strategy="no").train()
    t = trainer(tmp_path, stage_steps=[3], save_strategy="no")
    assert t.train(resume_from_checkpoint=True).global_step == 2 + 3 + 3


class Records(TrainerCallback):
    """Keeps the step and the last step that each event sees."""

    def __init__(self) -> None:
        self.seen: dict[str, list[tuple[int, int]]] = {}
        for event in ("on_train_begin", "on_step_end", "on_save", "on_evaluate", "on_log", "on_train_end"):
            setattr(self, event, self._keeper(event))

    def _keeper(self, event: str) -> Any:
        def keep(args: Any, state: Any, control: Any, **_: Any) -> None:
            self.seen.setdefault(event, []).append((state.global_step, state.max_steps))

        return keep


@pytest.mark.parametrize("resumed", [False, True])
def test_callbacks_see_the_steps_of_the_stage_and_logs_count_on(resumed: bool, tmp_path: Path) -> None:
    options: dict[str, Any] = {**EVERY_STEP, "stage_steps": [2, 3, 1]}
    if resumed:
        trainer(tmp_path, **{**options, "stages_to_train": [0], "stage_steps": [2]}).train()
    records = Records()
    t = trainer(tmp_path, callbacks=[records], **options)
    t.train(resume_from_checkpoint=resumed)
    lengths = [3, 1] if resumed else [2, 3, 1]
    of_stages = [(step, length) for length in lengths for step in range(1, length + 1)]
    assert records.seen["on_step_end"] == records.seen["on_save"] == records.seen["on_evaluate"] == of_stages
    assert records.seen["on_train_begin"] == [(0, length) for length in lengths]
    assert records.seen["on_train_end"] == [(length, length) for length in lengths]
    logged = [step for step, _ in records.seen["on_log"]]
    assert logged == sorted(logged) and logged[-1] == 6 and logged[0] == (3 if resumed else 1)
    history = [entry["step"] for entry in json.loads((tmp_path / "log_history.json").read_text())]
    assert history == sorted(history) and set(history) == set(range(1, 7))
    for stage, length in enumerate([2, 3, 1]):  # checkpoints are named by the steps that callbacks see
        found = {path.name for path in (tmp_path / f"stage-{stage}").glob("checkpoint-*")}
        assert found == {f"checkpoint-{step}" for step in range(1, length + 1)}


def test_a_sigterm_asks_for_a_checkpoint_in_every_stage_and_means_what_it_did_after_training(tmp_path: Path) -> None:
    before, seen = signal.getsignal(signal.SIGTERM), {}

    class Look(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            seen.setdefault(t.stage, set()).add(getattr(signal.getsignal(signal.SIGTERM), "__self__", None))

    t = trainer(tmp_path, enable_jit_checkpoint=True, stage_steps=[2], save_strategy="no", callbacks=[Look()])
    managers = {c.jit_manager for c in t.callback_handler.callbacks if hasattr(c, "jit_manager")}
    t.train()
    assert len(managers) == 1 and seen == {stage: managers for stage in range(3)}
    assert signal.getsignal(signal.SIGTERM) == before
