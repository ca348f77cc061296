"""One size trains on alone, taught by the whole model."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from mlfs import MLFSArguments, MLFSError, Subnet
from mlfs.ops import divergence
from mlfs.training.finishing import FinishingTrainer
from tests.supernets import elastic
from tests.tiny_models import make
from tests.trainers import rows

KINDS = [("bert", "ForSequenceClassification"), ("gpt2", "LMHeadModel"), ("llama-tied", "ForCausalLM")]


def trained(name: str, suffix: str) -> Any:
    """A super-transformer whose stages have an effect."""
    supernet = elastic(name, suffix)
    supernet.train_stage(2)
    generator = torch.Generator().manual_seed(0)
    for key, p in supernet.own_parameters().items():
        if "lora_B" in key:
            p.data.copy_(torch.randn(p.shape, generator=generator) * 0.1)
    return supernet


def finishing(folder: Path, supernet: Any, subnet: Subnet, suffix: str, **options: Any) -> FinishingTrainer:
    settings: dict[str, Any] = {
        "output_dir": str(folder), "report_to": [], "use_cpu": True, "disable_tqdm": True, "max_steps": 6,
        "per_device_train_batch_size": 4, "save_strategy": "no", "logging_steps": 1, "base_learning_rate": 5e-3,
    }  # fmt: skip
    args = MLFSArguments(**{**settings, **options})
    causal = "LM" in suffix
    data = {"train_dataset": rows(32, causal=causal), "eval_dataset": rows(16, 1, causal)}
    t = FinishingTrainer(supernet, subnet, args, **data)
    t.current_gradient_accumulation_steps = 1  # as within a step
    return t


@pytest.mark.parametrize(("name", "suffix"), KINDS)
@pytest.mark.parametrize("options", [{}, {"gradient_accumulation_steps": 2}, {"distill_beta": [0.0]}])
def test_the_copy_learns_and_the_run_stays_as_it_is(
    name: str, suffix: str, options: dict[str, Any], tmp_path: Path
) -> None:
    supernet = trained(name, suffix)
    before = {key: value.clone() for key, value in supernet.state_dict().items()}
    subnet = supernet.space.min
    start = supernet.extract(subnet)
    t = finishing(tmp_path, supernet, subnet, suffix, **options)
    t.train()
    assert all(torch.equal(before[key], value) for key, value in supernet.state_dict().items())
    moved = [key for key, p in t.model.named_parameters() if not torch.equal(p, start.get_parameter(key))]
    unused = {"transformer.wpe.weight"} if name == "gpt2" else set()
    assert {key for key, _ in t.model.named_parameters()} - set(moved) <= unused
    losses = [entry["loss"] for entry in t.state.log_history if "loss" in entry]
    assert len(losses) == 6 and losses[-1] < losses[0]
    assert "mlfs" not in type(t.model).__module__ and "eval_loss" in t.evaluate()


def test_the_loss_is_that_of_a_subnet(tmp_path: Path) -> None:
    supernet = trained("bert", "ForSequenceClassification")
    t = finishing(tmp_path, supernet, supernet.space.min, "", distill_beta=[0.0], distill_alpha=0.7, temperature=2.0)
    batch = {key: torch.tensor(value) for key, value in rows(4)[:].items()}
    t.model.train()
    loss = t.compute_loss(t.model, dict(batch))
    student = t.model.eval()(**batch)
    teacher = supernet.eval()(**batch).logits
    expected = 0.3 * student.loss + 0.7 * divergence(student.logits, teacher, None, 2.0)
    torch.testing.assert_close(loss, expected)
    with_states = finishing(tmp_path, supernet, supernet.space.min, "", distill_alpha=0.7, temperature=2.0)
    with_states.model.train()
    assert with_states.compute_loss(with_states.model, dict(batch)) > loss
    evaluated = t.compute_loss(t.model.eval(), dict(batch))
    torch.testing.assert_close(evaluated, student.loss)


def test_of_the_whole_model_nothing_is_left_to_distil(tmp_path: Path) -> None:
    supernet = trained("bert", "ForSequenceClassification")
    t = finishing(tmp_path, supernet, supernet.space.max, "", distill_alpha=1.0)
    batch = {key: torch.tensor(value) for key, value in rows(4)[:].items()}
    t.model.train()
    assert t.compute_loss(t.model, dict(batch)).abs() < 1e-5


def test_accumulated_batches_give_the_gradient_of_one_large_batch(tmp_path: Path) -> None:
    weights = []
    for options in ({"per_device_train_batch_size": 8}, {"gradient_accumulation_steps": 2}):
        supernet = trained("llama-tied", "ForCausalLM")
        t = finishing(
            tmp_path, supernet, supernet.space.min, "LM", max_steps=1, optim="sgd", max_grad_norm=0.0,
            train_sampling_strategy="sequential", **options,
        )  # fmt: skip
        t.train()
        weights.append({key: p.detach().clone() for key, p in t.model.named_parameters()})
    for key, value in weights[0].items():
        torch.testing.assert_close(weights[1][key], value, rtol=1e-4, atol=1e-6)


def test_a_size_that_is_not_on_offer_is_refused(tmp_path: Path) -> None:
    supernet = trained("bert", "ForSequenceClassification")
    with pytest.raises(MLFSError):
        finishing(tmp_path, supernet, Subnet(7, 2, 20, 4), "")


def test_the_base_at_hand_is_not_changed(tmp_path: Path) -> None:
    supernet = trained("bert", "ForSequenceClassification")
    base = copy.deepcopy(make("bert", "ForSequenceClassification").state_dict())
    finishing(tmp_path, supernet, supernet.space.max, "", max_steps=2).train()
    own = supernet.head_parameters()
    for key, value in supernet.base_parameters().items():
        assert key in own or torch.equal(value, base[key])


def test_a_size_that_is_lost_in_training_is_not_given_out(tmp_path: Path) -> None:
    supernet = trained("llama-tied", "ForCausalLM")
    with pytest.raises(MLFSError, match="NaN or infinite"):
        finishing(tmp_path, supernet, supernet.space.min, "LM", base_learning_rate=1e30).train()
    assert supernet.merged_stages == 0
    supernet.train_stage(1)


def test_the_teacher_runs_in_the_precision_of_the_copy(tmp_path: Path) -> None:
    supernet = trained("llama-tied", "ForCausalLM")
    seen = set()
    supernet.model.model.layers[0].mlp.register_forward_hook(lambda module, given, output: seen.add(output.dtype))
    finishing(tmp_path, supernet, supernet.space.min, "LM", bf16=True, max_steps=1).train()
    assert seen == {torch.bfloat16}
