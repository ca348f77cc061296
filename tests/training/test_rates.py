"""What trains of the pretrained weights beside adapters: norms and embeddings, at a learning rate of their own."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from mlfs import MLFSTrainer, SuperTransformer
from mlfs.elastic.embedding import ElasticEmbedding
from mlfs.elastic.norm import ElasticNorm
from mlfs.training.rates import give_rate, pretrained_that_train
from tests.tiny_models import make
from tests.trainers import SPACE, assert_same, cut_off, own, trainer

MODELS = [("bert", "ForSequenceClassification"), ("gpt2", "LMHeadModel"), ("llama-tied", "ForCausalLM")]


def kind_of(supernet: SuperTransformer) -> dict[int, str]:
    """Names what each parameter is by its identity: norm, embedding, head or adapter."""
    kinds = {}
    for name, module in supernet.model.named_modules():
        for key, parameter in module.named_parameters(recurse=False):
            if isinstance(module, ElasticNorm):
                kinds[id(parameter)] = "norm"
            elif isinstance(module, ElasticEmbedding):
                kinds[id(parameter)] = "embedding"
            elif key.isdigit() and "lora" in name:
                kinds[id(parameter)] = "adapter"
            else:
                kinds.setdefault(id(parameter), "other")
    return kinds


def rates_of(t: MLFSTrainer) -> dict[str, set[float]]:
    """The learning rates of each kind of parameter that the optimizer has."""
    kinds, found = kind_of(t.supernet), {}
    for group in t.optimizer.param_groups:
        for parameter in group["params"]:
            found.setdefault(kinds[id(parameter)], set()).add(group["lr"])
    return found


@pytest.mark.parametrize("stage, factor", [(0, 1.0), (1, 3.0), (2, 3.0)])
@pytest.mark.parametrize("name, suffix", MODELS)
def test_norms_and_embeddings_have_the_rate_of_the_base_in_each_stage(
    name: str, suffix: str, stage: int, factor: float, tmp_path: Path
) -> None:
    options = {"learning_rate": 1e-2, "base_learning_rate": 1e-4, "subnet_rate_factor": 3.0}
    t = trainer(tmp_path, name, suffix, train_norms=True, train_embeddings=True, weight_decay=0.1, **options)
    t.stage = stage
    t._set_length_and_rate({"learning_rate": 1e-2, "num_train_epochs": 1.0, "max_steps": -1})
    t._let_train()
    t.create_optimizer()
    rates = rates_of(t)
    assert list(rates["norm"]) == list(rates["embedding"]) == [pytest.approx(factor * 1e-4)]
    assert list(rates["adapter"]) == [pytest.approx(factor * 1e-2)]
    listed = [id(p) for group in t.optimizer.param_groups for p in group["params"]]
    trains = [id(p) for p in t.supernet.model.parameters() if p.requires_grad]
    assert sorted(listed) == sorted(trains)  # each once
    decayed = {kind_of(t.supernet)[id(p)] for g in t.optimizer.param_groups if g["weight_decay"] for p in g["params"]}
    assert "norm" not in decayed and {"adapter", "embedding"} <= decayed


@pytest.mark.parametrize(
    "name, suffix, options, expected",
    [
        ("bert", "ForSequenceClassification", {}, True),
        ("bert", "ForSequenceClassification", {"train_embeddings": False}, False),
        ("bert", "ForMaskedLM", {}, False),
        ("gpt2", "LMHeadModel", {}, False),
        ("llama-tied", "ForCausalLM", {}, False),
        ("llama-tied", "ForCausalLM", {"train_embeddings": True}, True),
        ("llama", "ForSequenceClassification", {}, True),
        ("llama", "ForSequenceClassification", {"order": "rotation"}, False),
    ],
)
@pytest.mark.parametrize("stage", [0, 2])
def test_embeddings_train_by_default_where_no_language_model_s_head_is(
    name: str, suffix: str, options: dict[str, Any], expected: bool, stage: int, tmp_path: Path
) -> None:
    t = trainer(tmp_path, name, suffix, **{"train_embeddings": None, **options})
    t.stage = stage
    t._let_train()
    t.create_optimizer()
    assert ("embedding" in rates_of(t)) is expected


def test_the_rate_of_the_base_is_never_above_that_of_the_adapters(tmp_path: Path) -> None:
    t = trainer(tmp_path, train_norms=True, learning_rate=1e-5, base_learning_rate=1e-4)
    t._let_train()
    t.create_optimizer()
    assert rates_of(t) == {"norm": {1e-5}, "adapter": {1e-5}, "other": {1e-5}}
    assert len(t.optimizer.param_groups) == 2  # as a Trainer makes them: with decay and without


def test_what_all_weights_train_at_is_left_alone(tmp_path: Path) -> None:
    t = trainer(tmp_path, train_norms=True, train_embeddings=True, train_base=[0], base_learning_rate=2e-4)
    t._set_length_and_rate({"learning_rate": 1e-2, "num_train_epochs": 1.0, "max_steps": -1})
    t._let_train()
    t.create_optimizer()
    assert {group["lr"] for group in t.optimizer.param_groups} == {2e-4}


@pytest.mark.parametrize("scheduler", ["linear", "cosine", "constant"])
def test_schedules_scale_both_rates(scheduler: str, tmp_path: Path) -> None:
    seen: list[list[float]] = []

    class Watched(MLFSTrainer):
        def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
            seen.append(sorted({group["lr"] for group in self.optimizer.param_groups}))
            return super().training_step(*args, **kwargs)

    t = trainer(
        tmp_path, train_norms=True, learning_rate=1e-2, base_learning_rate=1e-3, stage_steps=[6], warmup_steps=2,
        lr_scheduler_type=scheduler, stages_to_train=[0], save_strategy="no",
    )  # fmt: skip
    t.__class__ = Watched
    t.train()
    assert len(seen) == 6
    for rates in seen[1:]:  # the first is 0
        assert len(rates) == 2 and rates[1] == pytest.approx(10 * rates[0])


@pytest.mark.parametrize("name, suffix", MODELS)
def test_what_trained_is_saved_restored_and_extracted(name: str, suffix: str, tmp_path: Path) -> None:
    before = {key: p.detach().clone() for key, p in make(name, suffix).named_parameters()}
    t = trainer(tmp_path, name, suffix, train_norms=True, train_embeddings=True, save_strategy="no", stage_steps=[3])
    t.train()
    changed = {key for key, module in t.supernet.model.named_modules() if isinstance(module, ElasticEmbedding)}
    for key in changed:
        assert not torch.equal(t.supernet.model.get_parameter(f"{key}.weight"), before[f"{key}.weight"])
    again = SuperTransformer.from_pretrained(tmp_path, make(name, suffix))
    assert_same(own(t.supernet), own(again))
    batch = {key: torch.tensor(value) for key, value in t.eval_dataset[:4].items() if key != "labels"}
    for subnet in (again.space.max, again.space.min):
        with torch.no_grad(), again.eval().activate(subnet):
            expected = again(**batch).logits
            assert torch.equal(t.supernet.eval().bound(subnet)(**batch).logits, expected)
        torch.testing.assert_close(again.extract(subnet).eval()(**batch).logits, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name, suffix", MODELS)
def test_a_state_dict_carries_what_trained(name: str, suffix: str, tmp_path: Path) -> None:
    options = {"train_norms": True, "train_embeddings": True, "save_strategy": "no", "stage_steps": [2]}
    t = trainer(tmp_path, name, suffix, **options)
    t.train()
    fresh = SuperTransformer(make(name, suffix), SPACE, rank=2)
    fresh.load_state_dict(t.supernet.state_dict())
    assert_same(own(t.supernet), own(fresh))
    fresh.save_pretrained(tmp_path / "again")
    assert_same(own(SuperTransformer.from_pretrained(tmp_path / "again", make(name, suffix))), own(fresh))


def test_a_run_that_was_cut_off_goes_on_bit_for_bit(tmp_path: Path) -> None:
    options = {"train_norms": True, "train_embeddings": None, "teacher": "frozen", "stage_steps": [5], "save_steps": 2}
    whole = trainer(tmp_path / "whole", **options)
    whole.train()

    cut_off(trainer(tmp_path / "cut", **options), 1, 3)
    resumed = trainer(tmp_path / "cut", **options)
    resumed.train(resume_from_checkpoint=True)
    assert_same(own(whole.supernet), own(resumed.supernet))


def test_groups_are_split_and_keep_what_they_say() -> None:
    a, b, c = (nn.Parameter(torch.ones(2)) for _ in range(3))
    groups = [{"params": [a, b], "weight_decay": 0.5}, {"params": [c], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1.0, betas=(0.5, 0.6))
    give_rate(optimizer, [b, c], 0.25)
    found = [(group["params"], group["lr"], group["weight_decay"]) for group in optimizer.param_groups]
    assert [(len(p), lr, decay) for p, lr, decay in found] == [(1, 1.0, 0.5), (1, 0.25, 0.0), (1, 0.25, 0.5)]
    assert found[0][0][0] is a and found[1][0][0] is c and found[2][0][0] is b
    assert all(group["betas"] == (0.5, 0.6) for group in optimizer.param_groups)


def test_frozen_norms_and_embeddings_are_not_listed() -> None:
    supernet = SuperTransformer(make("bert", "ForSequenceClassification"), rank=2)
    assert pretrained_that_train(supernet) == []
    supernet.train_stage(1, norms=True)
    norms = len(pretrained_that_train(supernet))
    supernet.train_stage(1, norms=True, embeddings=True)
    assert norms and len(pretrained_that_train(supernet)) > norms
    supernet.train_stage(1)
    assert pretrained_that_train(supernet) == []
