"""A loss of one's own is the only one that is computed; models that leave their task open, or give no logits."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, mse_loss

from mlfs import MLFSTrainer, SuperTransformer
from mlfs.supernet.importance import importance
from mlfs.training.ranking import rank_depths, rank_units
from mlfs.training.task import Classification, MultiLabelClassification
from tests.tiny_models import make
from tests.trainers import ONE_STEP, SPACE, one_step, own, rows, trainer
from tests.training.plain import assert_close, gradients_of, mlfs_and_plain

HOWS = pytest.mark.parametrize("how", ["sequential", "lockstep"])
QUICK: dict[str, Any] = {"stage_steps": [2], "save_strategy": "no", "eval_strategy": "epoch"}


def on_soft_labels(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
    """Of probabilities (batch, classes), which the model's own loss takes for labels that are there or not."""
    return cross_entropy(outputs["logits"], labels)


def soft(example: dict[str, Any]) -> dict[str, Any]:
    return {"labels": [0.9 - 0.8 * example["labels"], 0.1 + 0.8 * example["labels"]]}


def as_dicts(examples: list[dict[str, Any]]) -> dict[str, Any]:
    """Collates examples; the labels of a batch are a dict."""
    batch = {name: torch.tensor([example[name] for example in examples]) for name in examples[0]}
    return {**batch, "labels": {"class": batch["labels"], "weight": torch.full((len(examples),), 0.5)}}


class OfDicts:
    """Takes labels that no model understands."""

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        labels = inputs.pop("labels")
        outputs = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
        each = cross_entropy(outputs.logits, labels["class"], reduction="none")
        loss = (each * labels["weight"]).mean()
        return (loss, outputs) if return_outputs else loss


def own_trainer(folder: Path, mixin: type | None = None, change: Any = None, **options: Any) -> MLFSTrainer:
    t = trainer(folder, **{**QUICK, **options})
    if mixin is not None:
        t.__class__ = type("Own", (mixin, MLFSTrainer), {})
    if change is not None:
        t.train_dataset, t.eval_dataset = t.train_dataset.map(change), t.eval_dataset.map(change)
    return t


@HOWS
@pytest.mark.parametrize("order", ["gradient", "activation"])
def test_the_models_own_loss_is_never_computed(order, how, tmp_path: Path, monkeypatch: Any) -> None:
    """Neither in ordering, nor where latency is measured: it would set problem_type by labels of another meaning."""
    t = own_trainer(tmp_path, change=soft, order=order, subnet_execution=how)
    t.compute_loss_func = on_soft_labels
    t.train()
    assert t.model.config.problem_type is None
    assert t.supernet.permutation and "eval_min_latency" in t.evaluate()


@HOWS
@pytest.mark.parametrize("order", ["gradient", "activation"])
def test_labels_that_only_ones_own_loss_understands(order, how, tmp_path: Path) -> None:
    t = own_trainer(tmp_path, OfDicts, order=order, subnet_execution=how)
    t.data_collator = as_dicts
    before = own(t.supernet)
    t.train()
    assert any("lora_B.2" in n and not torch.equal(before[n], p) for n, p in own(t.supernet).items())
    assert t.evaluate()["eval_min_loss"] > 0


@pytest.mark.parametrize("weights", [[1.0, 1.0], [1.0, 9.0]])
def test_units_are_ranked_by_ones_own_loss(weights, tmp_path: Path) -> None:
    """Against the gradients of that loss, computed by a model whose own loss it is."""
    weight = torch.tensor(weights)

    def weighed(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
        return cross_entropy(outputs["logits"], labels, weight, reduction="sum") / num_items_in_batch

    t = trainer(tmp_path)
    t.compute_loss_func = weighed
    batches = [{k: torch.tensor(v) for k, v in rows(4, seed).to_dict().items()} for seed in range(2)]
    found = rank_units(t, "gradient", batches)

    def loss_of(batch: Any) -> torch.Tensor:
        logits = t.supernet(**{k: v for k, v in batch.items() if k != "labels"}).logits
        each = cross_entropy(logits, batch["labels"], reduction="none")
        return (each * weight[batch["labels"]]).sum() / 4

    expected = importance(t.supernet.model, t.supernet.dimensions, "gradient", batches, loss_of)
    plain = t.supernet.importance("gradient", batches)
    for key, scores in expected.items():
        torch.testing.assert_close(found[key], scores, rtol=1e-4, atol=1e-7)
    is_plain = weights == [1.0, 1.0]
    close = all(torch.allclose(found[key], plain[key], rtol=1e-4, atol=1e-7) for key in plain)
    assert close == is_plain


def test_the_order_without_a_loss_of_ones_own_is_that_of_the_models_loss(tmp_path: Path) -> None:
    for name, suffix in (("bert", "ForSequenceClassification"), ("llama", "ForCausalLM")):
        t = trainer(tmp_path / name, name, suffix)
        batches = [{k: torch.tensor(v) for k, v in rows(4, 0, "LM" in suffix).to_dict().items()}]
        for method in ("gradient", "activation"):
            found, expected = rank_units(t, method, batches), t.supernet.importance(method, batches)
            assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_ranking_without_labels_is_by_what_the_model_itself_predicts(tmp_path: Path) -> None:
    t, batch = trainer(tmp_path), {"input_ids": torch.ones(2, 3, dtype=torch.int64)}
    for method in ("gradient", "activation"):
        scores = rank_units(t, method, [batch])  # type: ignore[arg-type]
        assert all(values.isfinite().all() and values.any() for values in scores.values())
    assert sorted(rank_depths(t, "loss", [batch])) == [0, 1, 2, 3]


# ---- a task that the labels decide ----------------------------------------------------------------------------------


def float_batch(classes: int) -> dict[str, torch.Tensor]:
    batch = {k: torch.tensor(v) for k, v in rows(4).to_dict().items()}
    batch["labels"] = torch.rand(4, classes, generator=torch.Generator().manual_seed(0)).round()
    return batch


def base_of(name: str, problem: str | None) -> Any:
    config = make(name, "ForSequenceClassification").config
    config.num_labels, config.problem_type = 3, problem
    torch.manual_seed(0)
    return type(make(name, "ForSequenceClassification"))(config)


def classifier(name: str, problem: str | None) -> SuperTransformer:
    return SuperTransformer(base_of(name, problem), SPACE, rank=2)


@HOWS
@pytest.mark.parametrize("loss", ["the model's", "own"])
@pytest.mark.parametrize("name", ["bert", "distilbert", "llama", "gpt2"])
def test_float_labels_are_learned_through_sigmoids_said_or_not(name, loss, how, tmp_path: Path) -> None:
    found = {}
    for problem in (None, "multi_label_classification"):
        supernet = classifier(name, problem)
        t = trainer(tmp_path / str(problem), name, supernet=supernet, subnet_execution=how, **ONE_STEP)
        if loss == "own":
            t.compute_loss_func = lambda out, labels, num_items_in_batch=None: binary_cross_entropy_with_logits(
                out["logits"], labels
            )
        kl = []
        t.means.add = lambda parts, prefix="", kl=kl: kl.append(parts.get("kl"))
        found[problem] = (*one_step(t, float_batch(3), torch.tensor(12) if loss == "own" else None), kl)
    (loss_a, gradients_a, kl_a), (loss_b, gradients_b, kl_b) = found.values()
    assert torch.equal(loss_a, loss_b)
    assert_close(gradients_a, gradients_b)
    assert kl_a[1:] == kl_b[1:] and all(value is not None for value in kl_a[1:])


def test_the_task_follows_what_the_configuration_comes_to_say(tmp_path: Path) -> None:
    t = trainer(tmp_path, supernet=classifier("bert", None))
    integers = {"labels": torch.tensor([0, 2])}
    assert type(t.task_of_batch(integers)) is Classification
    assert type(t.task_of_batch(float_batch(3))) is MultiLabelClassification
    t.model.config.problem_type = "single_label_classification"
    assert type(t.task_of_batch(float_batch(3))) is Classification
    t.model.config.problem_type = "multi_label_classification"
    assert type(t.task_of_batch(integers)) is MultiLabelClassification


def test_what_training_found_out_is_there_again_after_loading(tmp_path: Path) -> None:
    """Else the exported classifier's pipeline would apply a softmax to labels that were learned through sigmoids."""
    t = trainer(tmp_path, supernet=classifier("bert", None), stage_steps=[1], save_strategy="no")
    t.train_dataset = t.train_dataset.map(lambda example: {"labels": [1.0, 0.0, 1.0]})
    t.train()
    again = SuperTransformer.from_pretrained(tmp_path, base_of("bert", None))
    assert again.extract(SPACE.max).config.problem_type == "multi_label_classification"


# ---- models without logits ------------------------------------------------------------------------------------------


class ByFirstToken:
    """A loss on what an encoder gives."""

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        targets = inputs.pop("labels").float()
        outputs = model(**inputs)
        loss = mse_loss(outputs.last_hidden_state[:, 0, 0], targets)
        return (loss, outputs) if return_outputs else loss


class ByMean:
    """A loss that reads every token, padding too."""

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        targets = inputs.pop("labels").float()
        outputs = model(**inputs)
        loss = mse_loss(outputs.last_hidden_state.mean(1)[:, 0], targets)
        return (loss, outputs) if return_outputs else loss


ENCODERS = [("bert", tf.BertModel), ("roberta", tf.RobertaModel), ("distilbert", tf.DistilBertModel),
            ("llama", tf.LlamaModel), ("gpt2", tf.GPT2Model)]  # fmt: skip


def encoder(name: str, kind: type) -> SuperTransformer:
    torch.manual_seed(0)
    return SuperTransformer(kind(make(name, "ForSequenceClassification").config), SPACE, rank=2)


@HOWS
@pytest.mark.parametrize("name, kind", ENCODERS)
def test_a_model_without_logits_learns_from_hidden_states_alone(name, kind, how, tmp_path: Path) -> None:
    t = own_trainer(tmp_path, ByFirstToken, supernet=encoder(name, kind), remove_unused_columns=False,
                    label_names=["labels"], subnet_execution=how, order="gradient")  # fmt: skip
    t.train()
    logged = set().union(*t.state.log_history)
    assert {"min_feature", "min_task", "max_loss"} <= logged and "min_kl" not in logged
    assert t.evaluate()["eval_min_loss"] >= 0


@pytest.mark.parametrize("name, kind", ENCODERS)
def test_in_lockstep_a_model_without_logits_has_the_same_gradients(name, kind, tmp_path: Path) -> None:
    batch = {k: torch.tensor(v) for k, v in rows(4).to_dict().items()}
    batch["attention_mask"][1, 5:] = 0
    found = {}
    for how in ("sequential", "lockstep"):
        t = own_trainer(tmp_path / how, ByFirstToken, supernet=encoder(name, kind), subnet_execution=how, **ONE_STEP)
        found[how] = one_step(t, dict(batch), None)[1]
    assert_close(found["lockstep"], found["sequential"])


@pytest.mark.parametrize("name, kind", ENCODERS)
@pytest.mark.parametrize("mixin", [ByFirstToken, ByMean])
def test_what_padding_gives_is_what_plain_trainer_reads(mixin, name, kind, tmp_path: Path) -> None:
    """Encoders may skip padding only where nobody reads what they compute for it."""
    data = rows(8).map(lambda example, i: {"attention_mask": [1] * (9 - i % 4) + [0] * (i % 4)}, with_indices=True)
    ours, plain = mlfs_and_plain(
        tmp_path, name, "", mixin, supernet=encoder(name, kind), train_dataset=data, remove_unused_columns=False,
        label_names=["labels"],
    )  # fmt: skip
    (found,), (expected,) = gradients_of(ours), gradients_of(plain)
    assert_close(found, expected)


class OwnHead(tf.BertPreTrainedModel):
    """A classifier of somebody's own, by the mean over all tokens."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.bert, self.classifier = tf.BertModel(config), nn.Linear(config.hidden_size, 2)
        self.post_init()

    def forward(self, input_ids=None, attention_mask=None, labels=None, **kwargs):
        logits = self.classifier(self.bert(input_ids, attention_mask, **kwargs).last_hidden_state.mean(1))
        loss = None if labels is None else cross_entropy(logits, labels)
        return tf.modeling_outputs.SequenceClassifierOutput(loss=loss, logits=logits)


def test_a_head_of_ones_own_may_read_padding(tmp_path: Path) -> None:
    data = rows(8).map(lambda example, i: {"attention_mask": [1] * (9 - i % 4) + [0] * (i % 4)}, with_indices=True)
    torch.manual_seed(0)
    supernet = SuperTransformer(OwnHead(make("bert", "ForSequenceClassification").config), SPACE, rank=2)
    ours, plain = mlfs_and_plain(tmp_path, "bert", "", supernet=supernet, train_dataset=data, eval_dataset=data)
    assert ours.evaluate()["eval_max_loss"] == pytest.approx(plain.evaluate()["eval_loss"], rel=1e-5)
    (found,), (expected,) = gradients_of(ours), gradients_of(plain)
    assert_close(found, expected)


def test_a_bare_encoder_is_evaluated_on_what_it_gives_for_padding(tmp_path: Path) -> None:
    data = rows(8).map(lambda example, i: {"attention_mask": [1] * (9 - i % 4) + [0] * (i % 4)}, with_indices=True)
    ours, plain = mlfs_and_plain(
        tmp_path, "bert", "", ByMean, supernet=encoder("bert", tf.BertModel), eval_dataset=data,
        remove_unused_columns=False, label_names=["labels"],
    )  # fmt: skip
    assert ours.evaluate()["eval_max_loss"] == pytest.approx(plain.evaluate()["eval_loss"], rel=1e-5)
