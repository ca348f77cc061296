"""Encoders that skip the padding give the outputs of those that do not, and keep it where something reads it."""

import pytest
import torch

from mlfs import SearchSpace, SuperTransformer
from mlfs.models.fused.padding import reads_no_padding, without_padding
from tests.supernets import distance, elastic, perturb, subnets_of
from tests.tiny_models import inputs, make


@pytest.fixture
def tokens_seen(monkeypatch):
    """The shapes of what the first layer of a model gets; filled while it runs."""

    def watch(supernet) -> list[tuple[int, ...]]:
        seen: list[tuple[int, ...]] = []
        supernet.layers[0].register_forward_pre_hook(lambda module, args: seen.append(tuple(args[0].shape)))
        return seen

    return watch


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("suffix", ["ForSequenceClassification", "ForTokenClassification", "ForMaskedLM"])
@pytest.mark.parametrize("name", ["bert", "roberta"])
def test_encoders_skip_the_padding(name, suffix, implementation, compiled, tokens_seen, unfused):
    fused, plain = (make_one(name, suffix, dtype=torch.float64) for make_one in (elastic, unfused))
    for supernet in (fused, plain):
        supernet.model.set_attn_implementation(implementation)
    seen, batch = tokens_seen(fused), inputs()
    kept = batch["attention_mask"].bool()
    if suffix == "ForSequenceClassification":  # it reads the first token, which may be padding
        kept = kept[:, 0]
    for subnet in subnets_of(name).values():
        outcomes = []
        for supernet in (fused, plain):
            supernet.train_stage(2)
            with supernet.activate(subnet), without_padding(supernet is fused):
                logits = supernet(**batch).logits[kept]
            logits.square().sum().backward()
            outcomes.append([logits.detach(), *(p.grad for p in supernet.parameters() if p.grad is not None)])
            supernet.zero_grad()
        assert len(outcomes[0]) == len(outcomes[1]) > 10
        for a, b in zip(*outcomes, strict=True):
            assert distance(a, b) < 1e-9
    assert {shape[:2] for shape in seen} == {(1, int(batch["attention_mask"].sum()))}


def test_padding_stays_where_it_has_to(compiled, tokens_seen):
    supernet = elastic("bert", "ForSequenceClassification", dtype=torch.float64)
    seen, batch = tokens_seen(supernet), inputs()
    with torch.no_grad():
        out = supernet(**batch, output_hidden_states=True)  # unless asked for, all is as in transformers
        with without_padding():
            with supernet.activate_rows([supernet.space.max] * 3):
                supernet(**batch)
            supernet(**inputs("left"))  # the classifier reads the first token, here padding
    assert {state.shape for state in out.hidden_states} == {(3, 11, 48)}
    assert set(seen) == {(3, 11, 48)}


def test_a_mask_that_weighs_keys_is_kept(compiled, unfused):
    """Numbers to be added that are neither 0 nor the lowest."""
    fused, plain = (f("bert", "ForTokenClassification", dtype=torch.float64) for f in (elastic, unfused))
    ids, lowest = inputs()["input_ids"], torch.finfo(torch.float64).min
    for some in (-1.5, lowest):
        mask = torch.zeros(3, 1, 11, 11, dtype=torch.float64)
        mask[:, :, :, 2] = some
        with torch.no_grad():
            found, expected = (supernet(ids, attention_mask=mask).logits for supernet in (fused, plain))
        kept = torch.arange(11) != 2
        assert distance(found[:, kept], expected[:, kept]) < 1e-9


def test_a_mask_of_each_query_is_kept(compiled, tokens_seen):
    """One that is not the same for every query cannot be had by leaving tokens out."""
    supernet = elastic("bert", "ForTokenClassification", dtype=torch.float64)
    seen, ids = tokens_seen(supernet), inputs()["input_ids"]
    causal = torch.ones(11, 11).tril().bool().expand(3, 1, 11, 11)
    with torch.no_grad():
        logits, expected = (
            supernet(ids, attention_mask=causal).logits,
            supernet.model(ids, attention_mask=causal).logits,
        )
    assert torch.equal(logits, expected)
    assert set(seen) == {(3, 11, 48)}


def test_training_skips_the_padding_and_features_are_compared_token_by_token(compiled, tokens_seen, tmp_path):
    from mlfs import MLFSArguments, MLFSTrainer

    torch.manual_seed(0)
    supernet = elastic("bert", "ForSequenceClassification")
    rows = [{key: value[i] for key, value in inputs().items()} | {"labels": torch.tensor(i % 2)} for i in (0, 1, 2) * 4]
    args = MLFSArguments(
        output_dir=str(tmp_path), max_steps=3, per_device_train_batch_size=3, report_to=[], use_cpu=True,
        stages_to_train=[0, 1, 2], dropout_stages=[0, 1, 2], order="none", save_strategy="no", logging_steps=1,
    )  # fmt: skip
    trainer = MLFSTrainer(supernet, args, train_dataset=rows)
    seen = tokens_seen(supernet)
    trainer.train()
    assert {shape[0] for shape in seen} == {1}
    assert any("min_feature" in entry and 0 < entry["min_feature"] < 100 for entry in trainer.state.log_history)


@pytest.mark.parametrize("masked", [True, False])
def test_features_are_the_same_with_and_without_padding(masked, compiled):
    """Also of a subnet whose last state, which has its padding again, is compared with one that has not."""
    from mlfs.training.distillation import HiddenStateDistance

    space = SearchSpace((48, 24), (6, 2), (40, 16), ((0, 1, 2, 3), (0, 1)))
    supernet = perturb(SuperTransformer(make("bert", "ForSequenceClassification", dtype=torch.float64), space))
    distance = HiddenStateDistance(48, 4, [0.1]).double()
    batch = inputs() if masked else {"input_ids": inputs()["input_ids"]}
    losses = []
    for packs in (True, False):
        states = []
        for subnet in (space.min, space.max):
            with torch.no_grad(), supernet.activate(subnet), without_padding(packs):
                states.append(supernet(**batch, output_hidden_states=True))
        losses.append(distance(supernet.kept_layers(space.min), *states, batch.get("attention_mask")))
    assert losses[0] > 0
    torch.testing.assert_close(*losses, rtol=1e-9, atol=0)


def test_padding_that_a_loss_reads_is_kept():
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    labels = torch.tensor([[0, 1, -100], [1, 1, 0]])
    assert reads_no_padding({"labels": torch.tensor([0, 1]), "attention_mask": mask})
    assert reads_no_padding({"labels": labels, "attention_mask": mask})
    assert reads_no_padding({"labels": labels})
    assert not reads_no_padding({"labels": labels.abs(), "attention_mask": mask})
    assert not reads_no_padding({"start_positions": labels[:, 0], "attention_mask": mask})  # a softmax over all tokens
