"""The contract with transformers' Trainer: whatever it takes, MLFSTrainer does the same, refuses, or says why not.

"The same" is checked on one super-transformer at full size: Trainer and MLFSTrainer (stage 0) train it from the same
weights, data and seed, and must end with the same bits, logs and calls of callbacks.
"""

import dataclasses
import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Trainer, TrainerCallback, TrainingArguments, set_seed

from mlfs import MLFSArguments, MLFSError, MLFSTrainer, SuperTransformer
from tests.contracts import page
from tests.contracts.trainer_rows import (
    ARGUMENTS,
    FIELDS,
    METHODS,
    OPTIMIZERS,
    OWN,
    REFUSED,
    RESUMING,
    SAME,
    TWICE_EVALUATED,
    TWICE_SAVED,
    UNUSED,
    Counts,
    Records,
    Row,
    accuracy,
    text,
)
from tests.tiny_models import make
from tests.trainers import SPACE, assert_same, own, rows

# ---- one run by each ----------------------------------------------------------------------------------------------


class PlainTrainer(Trainer):
    """Trainer, with what trains of a super-transformer as the state that it saves."""

    supernet: SuperTransformer

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        Path(str(output_dir)).mkdir(parents=True, exist_ok=True)
        save_file(own(self.supernet), Path(str(output_dir), "own.safetensors"))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        with torch.no_grad():
            for name, value in load_file(Path(resume_from_checkpoint, "own.safetensors")).items():
                self.supernet.own_parameters()[name].copy_(value)

    def _load_best_model(self) -> None:
        self._load_from_checkpoint(str(self.state.best_model_checkpoint))


def make_trainer(plain: bool, folder: Path, row: Row, options: dict[str, Any] | None = None) -> tuple[Trainer, Records]:
    """Makes Trainer, or MLFSTrainer for stage 0, for one small model: the same weights each time."""
    settings: dict[str, Any] = {
        "output_dir": str(folder), "report_to": [], "use_cpu": True, "disable_tqdm": True, "max_steps": 6,
        "per_device_train_batch_size": 4, "per_device_eval_batch_size": 8, "learning_rate": 5e-3, "logging_steps": 2,
        "save_strategy": "no", "warmup_steps": 0, **row.options, **(options or {}),
    }  # fmt: skip
    token_labels = "LM" in row.model[1]
    torch.manual_seed(0)
    supernet = SuperTransformer(make(*row.model), SPACE, rank=2)
    data = {"train_dataset": rows(32, causal=token_labels), "eval_dataset": rows(16, 1, token_labels), **row.others()}
    records = Records()
    data["callbacks"] = [*data.get("callbacks", []), records]
    if not plain:
        # a Trainer has one rate: the embeddings, which train at another, stay
        args = MLFSArguments(stages_to_train=[0], rank=2, fused_head_loss=False, train_embeddings=False, **settings)
        return MLFSTrainer(supernet, args, **data), records
    supernet.train_stage(0)
    trainer = PlainTrainer(supernet.model, TrainingArguments(**settings), **data)
    trainer.supernet = supernet
    set_seed(trainer.args.seed)  # as each stage is: making a model drew numbers
    return trainer, records


def numbers(log: dict[str, Any]) -> dict[str, Any]:
    """What a log says, without times and what sizes cost."""
    times = ("runtime", "per_second", "latency", "parameters", "bytes", "preparation_time", "total_flos", "mem_cpu")
    return {key: value for key, value in log.items() if not any(time in key for time in times)}


def assert_same_runs(plain: Trainer, ours: Trainer, exact: bool = True) -> None:
    """Fails unless both have learned the same, and logged the same."""
    ours_own, plain_own = own(ours.supernet), own(plain.supernet)
    if exact:
        assert_same(ours_own, plain_own)
    for name, value in plain_own.items():
        torch.testing.assert_close(ours_own[name], value, rtol=1e-2, atol=1e-3)
    assert (ours.state.global_step, ours.state.epoch) == (plain.state.global_step, plain.state.epoch)
    assert len(ours.state.log_history) == len(plain.state.log_history)
    for found, expected in zip(ours.state.log_history, plain.state.log_history, strict=True):
        for key, value in numbers(expected).items():
            assert found[key] == (value if exact else pytest.approx(value, rel=1e-2)), key


SAME_ROWS = [row for row in (*FIELDS, *ARGUMENTS) if row.does == SAME]


@pytest.mark.parametrize("row", SAME_ROWS, ids=lambda row: row.fields[0])
def test_it_trains_as_trainer_does(row: Row, tmp_path: Path) -> None:
    (plain, calls), (ours, our_calls) = (make_trainer(plain, tmp_path / str(plain), row) for plain in (True, False))
    for trainer in (plain, ours):
        set_seed(trainer.args.seed)
        trainer.train()
    assert_same_runs(plain, ours, exact="bf16" not in row.options)
    assert our_calls.calls == calls.calls


def test_memory_is_given_back_as_often_as_by_trainer(tmp_path: Path, monkeypatch: Any) -> None:
    given_back: dict[bool, list[int]] = {True: [], False: []}
    for plain, module in ((True, "transformers.trainer"), (False, "mlfs.training.step")):
        trainer, _ = make_trainer(plain, tmp_path, Row("", SAME, options={"torch_empty_cache_steps": 4}))
        with monkeypatch.context() as patched:
            patched.setattr(f"{module}.clear_device_cache", lambda calls=given_back[plain]: calls.append(1))
            trainer.train()
    assert given_back == {True: [1, 1], False: [1, 1]}


def test_rows_try_what_they_are_about() -> None:
    untried = [row.fields[0] for row in SAME_ROWS if not row.options and row.others is dict]
    assert untried == ["output_dir", "model", "args", "processing_class"]
    assert all(set(row.fields) & set(row.options) for row in FIELDS if row.does == SAME and row.options)


@pytest.mark.parametrize(
    "row", [row for row in (*FIELDS, *OPTIMIZERS, *ARGUMENTS) if row.does == REFUSED], ids=lambda row: row.asked
)
def test_what_cannot_be_done_is_refused_at_once(row: Row, tmp_path: Path) -> None:
    with pytest.raises(MLFSError, match=r"is not supported: |cannot be given: ") as error:
        make_trainer(False, tmp_path / "run", row)
    message = str(error.value)
    assert message.startswith(row.asked.partition("=")[0]) and "\n" not in message
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "row", [row for row in FIELDS if row.does == UNUSED and row.options], ids=lambda row: row.fields[0]
)
def test_what_is_not_run_here_reaches_trainer_as_it_is(row: Row, tmp_path: Path) -> None:
    args = MLFSArguments(output_dir=str(tmp_path), **row.options)
    plain = TrainingArguments(output_dir=str(tmp_path), **row.options)
    assert all(getattr(args, name) == getattr(plain, name) for name in row.fields)


def test_every_option_and_argument_of_trainer_has_one_row() -> None:
    named = [name for row in FIELDS for name in row.fields]
    assert sorted(named) == sorted(field.name for field in dataclasses.fields(TrainingArguments))
    arguments = [name for row in ARGUMENTS for name in row.fields]
    assert sorted(arguments) == sorted(set(inspect.signature(Trainer.__init__).parameters) - {"self"})


# ---- resuming, evaluation, methods --------------------------------------------------------------------------------


class Breaks(TrainerCallback):
    """Breaks off in step 5, as a kill would."""

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 4:
            raise KeyboardInterrupt


@pytest.mark.parametrize("row", RESUMING, ids=lambda row: row.asked)
def test_it_resumes_as_trainer_does(row: Row, tmp_path: Path) -> None:
    ended = []
    for plain in (True, False):
        folder = tmp_path / str(plain)
        broken, _ = make_trainer(plain, folder, row)
        broken.add_callback(Breaks())
        set_seed(broken.args.seed)
        with pytest.raises(KeyboardInterrupt):
            broken.train()
        trainer, records = make_trainer(plain, folder, row)
        trainer.train(resume_from_checkpoint=True)
        ended.append(
            (trainer, records.calls, [vars(c) for c in trainer.callback_handler.callbacks if type(c) is Counts])
        )
    (expected, *states), (found, *our_states) = ended
    assert_same_runs(expected, found)
    assert our_states == states


def test_it_evaluates_and_predicts_as_trainer_does(tmp_path: Path) -> None:
    row = Row("evaluate", SAME, others=lambda: {"compute_metrics": accuracy})
    (plain, _), (ours, _) = (make_trainer(plain, tmp_path, row) for plain in (True, False))
    expected = numbers(plain.evaluate())
    expected.pop("epoch")
    found = ours.evaluate()
    assert {f"eval_max_{key.removeprefix('eval_')}": value for key, value in expected.items()}.items() <= found.items()
    sizes = [found[f"eval_{name}_accuracy"] for name in ours.palette]
    assert found["eval_accuracy"] == pytest.approx(sum(sizes) / len(sizes))
    ours_predicted, predicted = ours.predict(rows(8, 3)), plain.predict(rows(8, 3))
    assert (ours_predicted.predictions == predicted.predictions).all()
    assert numbers(ours_predicted.metrics) == numbers(predicted.metrics)


@pytest.mark.parametrize("method", [row.asked for row in METHODS if row.does == REFUSED])
def test_methods_that_cannot_be_done_are_refused(method: str, tmp_path: Path) -> None:
    trainer, _ = make_trainer(False, tmp_path, FIELDS[0])
    with pytest.raises(MLFSError, match=f"^{method} is not supported: "):
        getattr(trainer, method)()


def recorded(trainer: Trainer) -> set[tuple[str, int, tuple[str, ...]]]:
    """How every method of Trainer is called on this one from now on: name, positional arguments, others' names."""
    shapes: set[tuple[str, int, tuple[str, ...]]] = set()
    kind = type(trainer)

    def record(name: str) -> Any:
        def method(self: Any, *args: Any, **kwargs: Any) -> Any:
            shapes.add((name, len(args), tuple(sorted(kwargs))))
            if name == "compute_loss":
                assert args[0].config.vocab_size
            return getattr(super(watching, self), name)(*args, **kwargs)

        return method

    names = [name for name, value in vars(Trainer).items() if inspect.isfunction(value) and not name.startswith("__")]
    watching: Any = type("Watching", (kind,), {name: record(name) for name in names})
    trainer.__class__ = watching
    return shapes


@pytest.mark.parametrize("execution", ["sequential", "lockstep"])
def test_methods_are_called_with_the_arguments_that_trainer_calls_them_with(execution: str, tmp_path: Path) -> None:
    row = Row("", SAME, options={**TWICE_EVALUATED, **TWICE_SAVED, "gradient_accumulation_steps": 2})
    shapes = []
    for plain in (True, False):
        trainer, _ = make_trainer(plain, tmp_path / str(plain), row)
        if not plain:
            trainer.args.stages_to_train, trainer.args.subnet_execution = [0, 1, 2], execution
        shapes.append(recorded(trainer))
        trainer.train()
        trainer.train(resume_from_checkpoint=True)
        trainer.evaluate()
        trainer.predict(rows(8))
    assert shapes[1] - shapes[0] == set()


def test_accumulated_means_over_sentences_are_those_of_one_large_batch(tmp_path: Path) -> None:
    row = Row("", OWN, options={"gradient_accumulation_steps": 2, "optim": "sgd"})
    whole = Row("", OWN, options={"per_device_train_batch_size": 8, "optim": "sgd"})
    trainers = [make_trainer(False, tmp_path / "ours", row)[0], make_trainer(True, tmp_path / "whole", whole)[0]]
    for trainer in trainers:
        trainer.model.config.attention_probs_dropout_prob = trainer.model.config.hidden_dropout_prob = 0.0
        for module in trainer.model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        set_seed(trainer.args.seed)
        trainer.train()
    ours, expected = (own(trainer.supernet) for trainer in trainers)
    for name, value in expected.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-4, atol=1e-5)


def test_the_page_says_what_is_tested() -> None:
    page.check("trainer", text())
