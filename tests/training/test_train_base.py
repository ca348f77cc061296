"""Stages in which all weights train instead of adapters (`train_base`)."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer, TrainingArguments

from mlfs import MLFSError, SuperTransformer
from mlfs.elastic.linear import ElasticLinear
from tests.supernets import elastic, subnets_of
from tests.tiny_models import all_models, inputs, logits_of, make
from tests.trainers import assert_same, cut_off, own, trainer

every_model = pytest.mark.parametrize(("name", "suffix"), all_models())
KINDS = [("bert", "ForSequenceClassification"), ("gpt2", "LMHeadModel"), ("llama-tied", "ForCausalLM")]


def weights(supernet: SuperTransformer) -> dict[str, torch.Tensor]:
    """The model's own weights by the names of the plain model, without stages and record."""
    names = supernet.base_parameters().keys() | supernet.own_parameters().keys()
    kept = {name for name in names if ".lora_" not in name}
    return {name: supernet.model.get_parameter(name).detach().clone() for name in kept}


@pytest.mark.parametrize(("name", "suffix"), KINDS)
@pytest.mark.parametrize("options", [{}, {"fused_head_loss": False}, {"gradient_accumulation_steps": 2}])
def test_stage_0_is_the_fine_tuning_of_a_plain_trainer(
    name: str, suffix: str, options: dict[str, Any], tmp_path: Path
) -> None:
    # with plain SGD, as AdamW makes steps out of the rounding of gradients that are zero (those of BERT's key biases)
    decays = {
        "weight_decay": 0.1, "max_grad_norm": 0.5, "warmup_steps": 2, "save_strategy": "no", "optim": "sgd",
    }  # fmt: skip
    ours = trainer(
        tmp_path / "ours", name, suffix, train_base=[0], stages_to_train=[0], base_learning_rate=0.1,
        dropout_stages=[], **decays, **options,
    )  # fmt: skip
    model = copy.deepcopy(make(name, suffix)).eval()
    model.train = lambda mode=True: model  # without dropout
    args = TrainingArguments(
        output_dir=str(tmp_path / "plain"), report_to=[], use_cpu=True, disable_tqdm=True, max_steps=8,
        per_device_train_batch_size=4, learning_rate=0.1, dataloader_pin_memory=False, **decays,
        gradient_accumulation_steps=options.get("gradient_accumulation_steps", 1),
    )  # fmt: skip
    plain = Trainer(model, args, train_dataset=ours.train_dataset)
    ours.train()
    plain.train()
    found, expected = weights(ours.supernet), dict(model.named_parameters())
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value.detach(), rtol=1e-4, atol=1e-6)
    assert any(not torch.equal(value, make(name, suffix).get_parameter(key)) for key, value in expected.items())


@every_model
def test_every_weight_of_a_size_trains_and_no_other(name: str, suffix: str) -> None:
    supernet = elastic(name, suffix)
    supernet.train_stage(0, base=True)
    assert not any(p.requires_grad for key, p in supernet.model.named_parameters() if ".lora_" in key)
    for subnet in subnets_of(name).values():
        supernet.model.zero_grad()
        with supernet.activate(subnet):
            logits_of(supernet(**inputs())).square().sum().backward()
        plain = supernet.extract(subnet).requires_grad_(True)
        logits_of(plain(**inputs())).square().sum().backward()
        # what the copy of a size learns, the leading slices learn: the squares add up, and nothing is left over
        found = sum(p.grad.square().sum() for p in supernet.model.parameters() if p.grad is not None)
        expected = sum(p.grad.square().sum() for p in plain.parameters() if p.grad is not None)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-9)
        assert supernet.count_trainable(subnet) == supernet.count_parameters(subnet)


@pytest.mark.parametrize(("name", "suffix"), KINDS)
@pytest.mark.parametrize("stages", [[0], [1, 2], [0, 1, 2], [2]])
def test_a_run_is_saved_restored_and_extracted(name: str, suffix: str, stages: list[int], tmp_path: Path) -> None:
    t = trainer(tmp_path, name, suffix, train_base=stages, stage_steps=[3], save_strategy="no")
    t.train()
    supernet = t.supernet
    again = SuperTransformer.from_pretrained(tmp_path, make(name, suffix))
    assert_same(own(supernet), own(again))
    into = SuperTransformer(make(name, suffix), supernet.space, rank=2)
    into.restore(tmp_path)
    state = SuperTransformer(make(name, suffix), supernet.space, rank=2)
    state.load_state_dict(supernet.state_dict())
    batch = inputs()
    for subnet in (supernet.space.max, supernet.space.min):
        outputs = []
        for model in (supernet, again, into, state, copy.deepcopy(supernet)):
            model.model.eval()
            with torch.no_grad(), model.activate(subnet):
                outputs.append(logits_of(model(**batch)))
        assert all(torch.equal(outputs[0], output) for output in outputs)
        with torch.no_grad():
            extracted = logits_of(supernet.extract(subnet).eval()(**batch))
        torch.testing.assert_close(extracted, outputs[0], rtol=1e-4, atol=1e-5)
    state.save_pretrained(tmp_path / "from state")
    assert_same(own(SuperTransformer.from_pretrained(tmp_path / "from state", make(name, suffix))), own(supernet))


@pytest.mark.parametrize("stages", [[0], [1], [2], [0, 1, 2]])
def test_each_stage_trains_its_own_part_alone(stages: list[int], tmp_path: Path) -> None:
    t = trainer(tmp_path, train_base=stages, stage_steps=[2], save_strategy="no")
    before: dict[str, torch.Tensor] = {}
    for stage in range(3):
        t.args.stages_to_train = [stage]
        t.args.overwrite_run = True
        before = {key: p.detach().clone() for key, p in t.supernet.model.named_parameters()}
        ordered = bool(t.supernet.permutation)
        t.train()
        if not ordered and t.supernet.permutation:
            continue  # units have changed places
        moved = {key for key, p in t.supernet.model.named_parameters() if not torch.equal(p, before[key])}
        adapters = {key for key in moved if ".lora_" in key}
        if stage in stages:
            assert not adapters and "bert.embeddings.word_embeddings.weight" in moved
        else:
            assert all(f".{stage}" in key for key in adapters) and adapters
            assert moved - adapters <= t.supernet.head_parameters()


def test_stages_without_an_effect_cost_nothing(tmp_path: Path) -> None:
    t = trainer(tmp_path, train_base=[0], stages_to_train=[0], save_strategy="no")
    t.train()
    layers = [m for m in t.supernet.elastic() if isinstance(m, ElasticLinear) and m.stages]
    assert t.supernet.trained_stages == 0 and all(layer.trained_stages == 0 for layer in layers)
    t.supernet.train_stage(1)
    t.supernet.merge_stages(1)
    assert all(layer._merged.data_ptr() == layer.own_weight.data_ptr() for layer in layers)  # no copy


@pytest.mark.parametrize("options", [{"train_base": [0, 1, 2]}, {"train_base": [1]}])
def test_a_run_that_was_cut_off_goes_on_as_if_it_had_not_been(options: dict[str, Any], tmp_path: Path) -> None:
    whole = trainer(tmp_path / "whole", **options)
    whole.train()

    cut_off(trainer(tmp_path / "cut", **options), 1, 5)
    rest = trainer(tmp_path / "cut", **options)
    rest.train(resume_from_checkpoint=True)
    assert_same(own(rest.supernet), own(whole.supernet))


def test_what_was_saved_before_the_base_trained_is_not_put_over_weights_that_have(tmp_path: Path) -> None:
    supernet = elastic("bert", "ForSequenceClassification")
    supernet.save_pretrained(tmp_path / "before")
    for options in ({"norms": True}, {"base": True}):
        supernet.train_stage(0, **options)
        with pytest.raises(MLFSError, match=r"has trained here.*base loaded anew"):
            supernet.restore(tmp_path / "before")
        supernet.save_pretrained(tmp_path / "after")
        supernet.restore(tmp_path / "after")


def test_a_trained_base_is_rotated_with_its_norms(tmp_path: Path) -> None:
    t = trainer(tmp_path, "llama", "ForCausalLM", train_base=[0, 1, 2], order="rotation", stage_steps=[2])
    t.train()
    again = SuperTransformer.from_pretrained(tmp_path, make("llama", "ForCausalLM"))
    assert_same(own(t.supernet), own(again))
    assert again.rotation is not None
    with torch.no_grad():
        found, expected = (logits_of(m.eval()(**inputs())) for m in (again, t.supernet))
    assert torch.equal(found, expected)


@pytest.mark.parametrize("execution", ["sequential", "lockstep"])
@pytest.mark.parametrize(("name", "suffix"), KINDS)
def test_both_executions_give_the_same_weights(name: str, suffix: str, execution: str, tmp_path: Path) -> None:
    runs = []
    for how in ("sequential", execution):
        t = trainer(
            tmp_path / how, name, suffix, train_base=[2], stages_to_train=[2], stage_steps=[2], save_strategy="no",
            subnet_execution=how, overwrite_run=True,
        )  # fmt: skip
        t.train()
        runs.append(own(t.supernet))
    for key, value in runs[0].items():
        # Adam's steps of 1e-4 are as long where a gradient is next to nothing, whatever its rounding
        torch.testing.assert_close(runs[1][key], value, rtol=1e-3, atol=5e-5)


def test_an_optimizer_of_weights_that_no_longer_train_is_refused() -> None:
    supernet = elastic("bert", "ForSequenceClassification")
    supernet.train_stage(0, base=True)
    old = torch.optim.SGD([p for p in supernet.model.parameters() if p.requires_grad], lr=0.1)
    supernet(**inputs()).logits.sum().backward()
    old.step()
    supernet.train_stage(1)
    with pytest.raises(MLFSError, match="make a new optimizer after train_stage"):
        old.step()


def test_wrong_stages_are_refused_and_true_is_every_stage(tmp_path: Path) -> None:
    with pytest.raises(MLFSError, match="some of the stages that train"):
        trainer(tmp_path, train_base=[1], stages_to_train=[0, 2])
    assert trainer(tmp_path, train_base=True).args.train_base == [0, 1, 2]
    assert trainer(tmp_path, train_base=False).args.train_base == []


def test_stages_that_are_merged_are_taken_apart_first() -> None:
    supernet = elastic("bert", "ForSequenceClassification")
    supernet.train_stage(1)
    supernet.merge_stages(1)
    with pytest.raises(MLFSError, match=r"merge_stages\(0\)"):
        supernet.train_stage(1, base=True)
    supernet.merge_stages(0)
    supernet.train_stage(1, base=True)


def test_the_rate_of_such_a_stage_is_its_own(tmp_path: Path) -> None:
    t = trainer(tmp_path, train_base=[0], base_learning_rate=2e-3, stage_steps=[2], logging_steps=1)
    t.train()
    rates = {entry["stage"]: entry["learning_rate"] for entry in reversed(t.state.log_history) if "loss" in entry}
    assert rates == {0: 2e-3, 1: 5e-3, 2: 5e-3}


@every_model
def test_without_gradients_weights_that_train_run_as_frozen_ones_do(name: str, suffix: str) -> None:
    frozen, trains = elastic(name, suffix).eval(), elastic(name, suffix).eval()
    frozen.train_stage(None)
    trains.train_stage(None, base=True)
    for subnet in subnets_of(name).values():
        with torch.no_grad():
            found, expected = (logits_of(m.bound(subnet)(**inputs())) for m in (trains, frozen))
        assert torch.equal(found, expected)
    for one, other in zip(frozen.elastic(), trains.elastic(), strict=True):
        if isinstance(one, ElasticLinear):
            with torch.no_grad():
                assert (one.for_operators() is None) == (other.for_operators() is None)
            assert other.for_operators() is None
