"""Training a language model without its logits: the same losses and gradients as with them, in less memory."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.profiler import profile
from transformers import Trainer

from mlfs import MLFSTrainer, SuperTransformer
from mlfs.models.fused.lm_head import HEAD_INPUT, vocabulary_head, without_logits
from mlfs.ops.backend import BACKENDS
from tests.tiny_models import all_models, inputs, make
from tests.trainers import ONE_STEP, SPACE, one_step, rows, trainer

CAUSAL = [("gpt2", "LMHeadModel"), ("llama-tied", "ForCausalLM"), ("gpt_neox", "ForCausalLM")]
MASKED = [("bert", "ForMaskedLM"), ("roberta", "ForMaskedLM"), ("distilbert", "ForMaskedLM")]


def batch_of(count: int = 4) -> dict[str, torch.Tensor]:
    """With padding, and labels that do not count."""
    batch = {k: torch.tensor(v) for k, v in rows(count, causal=True).to_dict().items()}
    batch["attention_mask"][1, 5:] = 0
    batch["labels"][0, 3:] = -100
    return batch


def step(folder: Path, name: str, suffix: str, dtype: torch.dtype = torch.float32, **options: Any) -> tuple[Any, ...]:
    """(loss, gradients, recorded parts, whether the head was left out) of one step."""
    batch = batch_of()
    items = None if "Masked" in suffix else batch["labels"][:, 1:].ne(-100).sum() * 3
    supernet = SuperTransformer(make(name, suffix, dtype=dtype), SPACE, rank=2)
    options = {"temperature": 2.0, **ONE_STEP, **options}
    t = trainer(folder, name, suffix, supernet=supernet, **options)
    left_out = t._head_to_leave_out(batch) is not None
    loss, gradients = one_step(t, batch, items)
    return loss, gradients, dict(t.means.sums), left_out


def assert_equal(found: tuple[Any, ...], goal: tuple[Any, ...], tolerance: float) -> None:
    assert found[3] and not goal[3]
    torch.testing.assert_close(found[0], goal[0], rtol=tolerance, atol=0, check_dtype=False)
    assert found[2].keys() == goal[2].keys() >= {"max_loss", "rest_loss", "rest_task", "rest_kl", "rest_feature"}
    for name, value in goal[2].items():
        torch.testing.assert_close(found[2][name], value, rtol=tolerance, atol=1e-9, check_dtype=False)
    assert found[1].keys() == goal[1].keys()
    for name, gradient in goal[1].items():
        error = (found[1][name] - gradient).abs().max()
        assert error <= 10 * tolerance * gradient.abs().max() + 1e-8, name


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("execution", ["sequential", "lockstep"])
@pytest.mark.parametrize("name, suffix", [*CAUSAL, *MASKED])
def test_losses_and_gradients_are_those_with_logits(tmp_path, name, suffix, execution, smoothing):
    options = {"subnet_execution": execution, "label_smoothing_factor": smoothing}
    found, goal = (step(tmp_path, name, suffix, fused_head_loss=fused, **options) for fused in (True, False))
    assert_equal(found, goal, 2e-5)


@pytest.mark.parametrize("execution", ["sequential", "lockstep"])
@pytest.mark.parametrize("name, suffix", [CAUSAL[0], MASKED[0]])
def test_in_float64_they_are_equal_to_the_rounding_of_transformers_loss(tmp_path, name, suffix, execution):
    """Which takes logits to float32, save in the forward pass of a masked language model."""
    options = {"subnet_execution": execution, "dtype": torch.float64, "distill_alpha": 0.5}
    found, goal = (step(tmp_path, name, suffix, fused_head_loss=fused, **options) for fused in (True, False))
    assert_equal(found, goal, 1e-12 if "Masked" in suffix and execution == "sequential" else 1e-7)


def test_a_run_comes_to_the_same_weights_and_evaluates_with_logits(tmp_path):
    def run(fused: bool) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
        options = {"save_strategy": "no", "gradient_accumulation_steps": 2, "stage_steps": [3], "dropout_stages": []}
        t = trainer(tmp_path / str(fused), "llama-tied", "ForCausalLM", fused_head_loss=fused, **options)
        t.train()
        return {n: p.detach() for n, p in t.supernet.own_parameters().items()}, t.evaluate()

    (weights, metrics), (goal, expected) = run(True), run(False)
    for name, value in goal.items():
        assert torch.allclose(weights[name], value, rtol=1e-2, atol=1e-3), name
    assert metrics["eval_min_loss"] == pytest.approx(expected["eval_min_loss"], rel=1e-3)


def test_under_autocast_logits_are_made_in_its_type(tmp_path, monkeypatch):
    module, seen = sys.modules["mlfs.ops.head_loss"], []
    real = module.run

    def run(operator, on, *arguments):
        if operator == "product":
            seen.append((arguments[0].dtype, arguments[3].dtype))  # of what is multiplied, and of the logits
        return real(operator, on, *arguments)

    monkeypatch.setattr(module, "run", run)
    results = []
    for fused in (True, False):
        t = trainer(
            tmp_path / str(fused), "gpt2", "LMHeadModel", fused_head_loss=fused, bf16=True, save_strategy="no",
            stage_steps=[2], dropout_stages=[],
        )  # fmt: skip
        t.train()
        results.append(t.evaluate())
    assert set(seen) == {(torch.bfloat16, torch.bfloat16)}
    assert results[0]["eval_min_loss"] == pytest.approx(results[1]["eval_min_loss"], rel=1e-2)


@pytest.mark.parametrize("execution", ["sequential", "lockstep"])
def test_no_tensor_of_a_step_is_as_large_as_the_logits(tmp_path, execution, monkeypatch):
    chunk = 1 << 17
    monkeypatch.setattr(sys.modules["mlfs.ops.head_loss"], "CHUNK_BYTES", dict.fromkeys(BACKENDS, chunk))
    ids = torch.randint(3, 4000, (8, 32), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "labels": ids.clone()}

    def largest(fused: bool) -> int:
        model = make("gpt2", "LMHeadModel")
        model.resize_token_embeddings(4000)
        supernet = SuperTransformer(model, SPACE, rank=2)
        options = {"subnet_execution": execution, "fused_head_loss": fused, **ONE_STEP}
        t = trainer(tmp_path, "gpt2", "LMHeadModel", supernet=supernet, **options)
        with profile(profile_memory=True) as recorded:
            one_step(t, batch, None)
        events = recorded.profiler.kineto_results.events()
        return max(event.nbytes() for event in events if event.name() == "[memory]")

    logits = 8 * 32 * 4000 * 4
    assert largest(False) >= logits - 8 * 4000 * 4
    assert largest(True) < logits / 4


@pytest.mark.parametrize("name, suffix", all_models())
def test_every_language_model_of_the_table_has_a_head_to_leave_out(name, suffix):
    model = SuperTransformer(make(name, suffix), SPACE if name[:5] not in ("gpt_b", "gpt_n") else None, rank=2).model
    head = vocabulary_head(model)
    assert (head is not None) == ("LM" in suffix)
    if head is not None:
        assert head is model.get_output_embeddings() and not model.training
        outputs = without_logits(model, head, {**inputs(), "labels": inputs()["input_ids"]})
        assert "logits" not in outputs and "loss" not in outputs and "forward" not in vars(head)
        assert not head._forward_pre_hooks
        torch.testing.assert_close(head(outputs[HEAD_INPUT]), model(**inputs()).logits)


def test_a_model_that_changes_its_logits_or_has_a_loss_of_its_own_keeps_them(monkeypatch):
    model = SuperTransformer(make("gpt2", "LMHeadModel"), SPACE, rank=2).model
    assert vocabulary_head(model) is not None
    model.loss_function = lambda *args, **kwargs: None
    assert vocabulary_head(model) is None
    del model._loss_function
    real = type(model).forward

    def capped(self, *args, **kwargs):
        outputs = real(self, *args, **kwargs)
        outputs.logits = torch.tanh(outputs.logits)
        return outputs

    monkeypatch.setattr(type(model), "forward", capped)
    assert vocabulary_head(model) is None


def test_a_loss_of_ones_own_gets_logits(tmp_path, monkeypatch):
    def own(outputs, labels, num_items_in_batch=None):
        return outputs["logits"].float().pow(2).mean()

    seen = []

    class Overriding(MLFSTrainer):
        def compute_loss(self, model, *args, **kwargs):
            loss, outputs = super().compute_loss(model, *args, **kwargs)
            seen.append(outputs["logits"].shape)
            return loss, outputs

    t = trainer(tmp_path, "gpt2", "LMHeadModel", **ONE_STEP)
    batch = batch_of()
    assert t._head_to_leave_out(batch) is t.supernet.model.get_output_embeddings()
    assert t._head_to_leave_out({"input_ids": batch["input_ids"]}) is None
    assert t._head_to_leave_out({**batch, "shift_labels": batch["labels"]}) is None
    t.label_smoother = lambda *args, **kwargs: torch.zeros(())
    assert t._head_to_leave_out(batch) is None
    t.label_smoother = None
    t.compute_loss_func = own
    assert t._head_to_leave_out(batch) is None
    one_step(t, batch, None)
    t.compute_loss_func = None
    t.supernet.model.get_output_embeddings().train_base(True)
    assert t._head_to_leave_out(batch) is None
    other = Overriding(t.supernet, t.args, train_dataset=rows(4, causal=True))
    other.supernet.train_stage(2)
    other.supernet.model.get_output_embeddings().train_base(False)
    assert other._head_to_leave_out(batch) is None
    one_step(other, batch, None)
    assert len(seen) == 4
    monkeypatch.setattr(t, "compute_loss", lambda *args, **kwargs: Trainer.compute_loss(t, *args, **kwargs))
    assert t._head_to_leave_out(batch) is None


def test_the_head_is_itself_again_after_an_error():
    model = SuperTransformer(make("gpt2", "LMHeadModel"), SPACE, rank=2).model
    head = vocabulary_head(model)
    with pytest.raises(ValueError):
        without_logits(model, head, {})
    assert "forward" not in vars(head) and not head._forward_pre_hooks
    assert model(**inputs()).logits.shape[-1] == head.out_features
