"""Methods that people override are called as plain Trainer calls them."""

import functools
import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy, kl_div, log_softmax
from transformers import Trainer

from mlfs import MLFSError, MLFSTrainer
from tests.tiny_models import make
from tests.trainers import ONE_STEP, one_step, rows, trainer
from tests.training.plain import assert_close, gradients_of, mlfs_and_plain

# What Trainer's documentation names for overriding, and what else subclasses out there override.
OVERRIDABLE = (
    "get_train_dataloader", "get_eval_dataloader", "get_test_dataloader", "create_optimizer", "create_scheduler",
    "create_optimizer_and_scheduler", "compute_loss", "training_step", "prediction_step", "evaluate", "predict",
    "evaluation_loop", "log", "save_model", "_save", "_save_checkpoint", "_prepare_inputs", "_prepare_input",
    "get_batch_samples", "compute_loss_context_manager", "autocast_smart_context_manager", "_get_train_sampler",
    "_get_eval_sampler", "_wrap_model", "_load_best_model", "_evaluate", "store_flos",
    "floating_point_ops", "num_examples", "get_decay_parameter_names", "_maybe_log_save_evaluate", "_clip_grad_norm",
    "_get_grad_norm", "_save_optimizer_and_scheduler", "_load_optimizer_and_scheduler", "_save_rng_state",
    "_determine_best_metric", "_get_learning_rate", "_get_num_items_in_batch",
)  # fmt: skip


class Calls:
    """Overrides every method of `OVERRIDABLE`, and keeps how each is called."""

    def __init_subclass__(cls) -> None:
        cls.calls: set[tuple[Any, ...]] = set()
        for name in OVERRIDABLE:
            setattr(cls, name, cls.keeping(name))

    @classmethod
    def keeping(cls, name: str) -> Any:
        @functools.wraps(getattr(Trainer, name))
        def method(self: Any, *args: Any, **kwargs: Any) -> Any:
            type(self).calls.add((name, len(args), tuple(sorted(kwargs))))
            if name in ("compute_loss", "training_step", "prediction_step"):
                assert args[0].config.hidden_size and callable(args[0].get_input_embeddings)
                assert isinstance(args[0], nn.Module) and isinstance(args[1], dict)
            return getattr(super(cls, self), name)(*args, **kwargs)

        return method


def calls_of(kind: Any, t: Trainer) -> set[tuple[Any, ...]]:
    t.train()
    t.evaluate()
    t.predict(t.eval_dataset)
    return kind.calls


@pytest.mark.parametrize("how", ["sequential", "lockstep"])
def test_every_method_is_called_as_plain_trainer_calls_it(how: str, tmp_path: Path) -> None:
    plain_kind, own_kind = type("Plain", (Calls, Trainer), {}), type("Own", (Calls, MLFSTrainer), {})
    made = trainer(
        tmp_path, subnet_execution=how, eval_strategy="steps", eval_steps=2, save_steps=2, stage_steps=[4],
        load_best_model_at_end=True, metric_for_best_model="loss", order_batches=2,
    )  # fmt: skip
    data = {"train_dataset": made.train_dataset, "eval_dataset": made.eval_dataset}
    found = calls_of(own_kind, own_kind(made.supernet, made.args, **data))
    plain = trainer(tmp_path / "plain", eval_strategy="steps", eval_steps=2, save_steps=2, max_steps=4,
                    load_best_model_at_end=True, metric_for_best_model="loss")  # fmt: skip
    expected = calls_of(plain_kind, plain_kind(make("bert", "ForSequenceClassification"), plain.args, **data))
    assert {name for name, *_ in found} >= {name for name, *_ in expected}
    # Subnets need outputs in training, which Trainer asks for where it evaluates: the same call, by the same names.
    assert found <= expected, sorted(found - expected)


class OldStyle:
    """As in many scripts: the rest of the arguments unnamed."""

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        assert set(kwargs) <= {"num_items_in_batch"} and model.config.num_labels == 2
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        weights = torch.tensor([1.0, 3.0], device=model.device)
        loss = cross_entropy(outputs.get("logits"), labels, weight=weights)
        return (loss, outputs) if return_outputs else loss


class Named(OldStyle):
    """Calls the model with what it likes, and adds to its loss."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(inputs["input_ids"], attention_mask=inputs["attention_mask"], labels=inputs["labels"])
        loss = outputs.loss + 0.1 * outputs.logits.pow(2).mean()
        return (loss, outputs) if return_outputs else loss


class TrainOnly:
    """In stage 0 outputs are not asked for, as Trainer does not."""

    def compute_loss(self, model, inputs, num_items_in_batch=None):
        return model(**inputs).loss * 2


class Tuples:
    """A model that gives tuples: stage 0 takes them."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**inputs, return_dict=False)
        return (outputs[0], outputs[1:]) if return_outputs else outputs[0]


@pytest.mark.parametrize("mixin", [OldStyle, Named, TrainOnly, Tuples])
def test_stage_0_with_an_override_has_the_gradients_of_plain_trainer(mixin: type, tmp_path: Path) -> None:
    ours, plain = mlfs_and_plain(tmp_path, "bert", "ForSequenceClassification", mixin)
    (found,), (expected,) = gradients_of(ours), gradients_of(plain)
    assert_close(found, expected)


@pytest.mark.parametrize("mixin", [OldStyle, Named])
@pytest.mark.parametrize(
    "name, suffix", [("bert", "ForSequenceClassification"), ("llama", "ForSequenceClassification")]
)
def test_an_override_is_the_same_in_lockstep(mixin: type, name: str, suffix: str, tmp_path: Path) -> None:
    batch = {key: torch.tensor(value) for key, value in rows(4).to_dict().items()}
    found = {}
    for how in ("sequential", "lockstep"):
        t = trainer(tmp_path / how, name, subnet_execution=how, **ONE_STEP)
        t.__class__ = type("Own", (mixin, MLFSTrainer), {})
        found[how] = one_step(t, dict(batch), None)[1]
    assert_close(found["lockstep"], found["sequential"])


class ExtraInputs:
    """A column that the model does not take: each row's weight."""

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        weights, labels = inputs.pop("weights"), inputs.pop("labels")
        outputs = model(**inputs)
        loss = (weights * cross_entropy(outputs.logits, labels, reduction="none")).mean()
        return (loss, outputs) if return_outputs else loss


@pytest.mark.parametrize("how", ["sequential", "lockstep"])
def test_a_column_that_only_the_override_knows(how: str, tmp_path: Path) -> None:
    ours, plain = mlfs_and_plain(
        tmp_path, "distilbert", "ForSequenceClassification", ExtraInputs, remove_unused_columns=False,
        train_dataset=rows(8).map(lambda example, i: {"weights": i / 4}, with_indices=True), subnet_execution=how,
        eval_dataset=rows(8).map(lambda example, i: {"weights": i / 4}, with_indices=True),
    )  # fmt: skip
    (found,), (expected,) = gradients_of(ours), gradients_of(plain)
    assert_close(found, expected)
    ours.args.stages_to_train = [2]
    ours.train()
    assert ours.evaluate()["eval_max_loss"] > 0


class OtherInputs(OldStyle):
    """Runs the model on something else than the batch."""

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        inputs["input_ids"] = inputs["input_ids"].flip(1)
        return super().compute_loss(model, inputs, return_outputs)


class Twice(OldStyle):
    """R-Drop: two passes whose dropout differs (arXiv 2106.14448)."""

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        labels = inputs.pop("labels")
        first, second = model(**inputs), model(**inputs)
        apart = kl_div(log_softmax(first.logits, -1), log_softmax(second.logits, -1), log_target=True)
        loss = cross_entropy(first.logits, labels) + apart
        return (loss, first) if return_outputs else loss


class NoOutputs(OldStyle):
    """Returns something else than the model's output."""

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        loss, outputs = super().compute_loss(model, inputs, True)
        return (loss, {"logits": outputs.logits}) if return_outputs else loss


class LogitsAlone(OldStyle):
    """Returns a tensor in the place of the model's output."""

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        loss, outputs = super().compute_loss(model, inputs, True)
        return (loss, outputs.logits) if return_outputs else loss


@pytest.mark.parametrize("mixin, how, message", [
    (OtherInputs, "sequential", None), (Twice, "sequential", None),
    (OtherInputs, "lockstep", "other input_ids than the batch's.*use 'sequential'"),
    (Twice, "lockstep", "the same batch again.*use 'sequential'"),
    (NoOutputs, "sequential", "without hidden_states.*distill_beta"),
    (NoOutputs, "lockstep", "without hidden_states.*distill_beta"),
    (LogitsAlone, "sequential", "outputs that are a Tensor"), (LogitsAlone, "lockstep", "outputs that are a Tensor"),
])  # fmt: skip
def test_what_cannot_be_right_is_refused(mixin: type, how: str, message: str | None, tmp_path: Path) -> None:
    batch = {key: torch.tensor(value) for key, value in rows(4).to_dict().items()}
    t = trainer(tmp_path, subnet_execution=how, **ONE_STEP)
    t.__class__ = type("Own", (mixin, MLFSTrainer), {})
    if message is None:
        assert one_step(t, batch, None)[1]
        return
    with pytest.raises(MLFSError, match=message) as raised:
        one_step(t, batch, None)
    assert "\n" not in str(raised.value)
    assert not t.model.config.output_hidden_states  # as it was


def test_without_a_distance_of_hidden_states_outputs_need_logits_alone(tmp_path: Path) -> None:
    batch = {key: torch.tensor(value) for key, value in rows(4).to_dict().items()}
    t = trainer(tmp_path, dropout_stages=[], distill_beta=[0.0])
    t.__class__ = type("Own", (NoOutputs, MLFSTrainer), {})
    assert one_step(t, batch, None)[1]


def test_the_list_of_what_is_overridden_is_trainers() -> None:
    assert all(inspect.isfunction(getattr(Trainer, name)) for name in OVERRIDABLE)
