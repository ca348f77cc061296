"""Low-rank stages of the input embeddings (`adapt_embeddings`)."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from mlfs import ElasticEmbedding, MLFSError, SuperTransformer
from mlfs.models.convert import adapted_embeddings
from tests.tiny_models import inputs, logits_of, make
from tests.trainers import SPACE, assert_same, own, trainer

MODELS = [("bert", "ForSequenceClassification"), ("gpt2", "ForSequenceClassification"), ("llama", "ForCausalLM")]
every_model = pytest.mark.parametrize(("name", "suffix"), MODELS)


def adapted(name: str, suffix: str, effect: bool = True, **options: Any) -> SuperTransformer:
    """A super-transformer whose adapters, those of the embeddings among them, have an effect."""
    supernet = SuperTransformer(copy.deepcopy(make(name, suffix)), rank=2, adapt_embeddings=True, **options)
    supernet.train_stage(2)
    if effect:
        generator = torch.Generator().manual_seed(0)
        for key, parameter in supernet.own_parameters().items():
            if "lora_B" in key:
                parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return supernet.eval()


def table_of(supernet: SuperTransformer) -> ElasticEmbedding:
    return supernet.model.get_input_embeddings()


@every_model
def test_input_embeddings_alone_have_stages(name: str, suffix: str) -> None:
    supernet = adapted(name, suffix, effect=False)
    tables = {key: m for key, m in supernet.model.named_modules() if isinstance(m, ElasticEmbedding)}
    assert [m for m in tables.values() if m.stages] == [table_of(supernet)]
    plain = make(name, suffix)
    torch.testing.assert_close(logits_of(supernet(**inputs())), logits_of(plain.eval()(**inputs())))


@pytest.mark.parametrize(
    "name, suffix", [("bert", "ForMaskedLM"), ("gpt2", "LMHeadModel"), ("llama-tied", "ForCausalLM")]
)
def test_embeddings_that_a_head_is_tied_to_have_none(name: str, suffix: str) -> None:
    assert adapted_embeddings(make(name, suffix)) is None
    supernet = adapted(name, suffix, effect=False)
    assert not table_of(supernet).stages and not any("embed" in key for key in own(supernet) if "lora" in key)


@every_model
def test_each_size_computes_what_its_plain_copy_does(name: str, suffix: str) -> None:
    supernet = adapted(name, suffix)
    whole = logits_of(supernet(**inputs()))
    before = [b.detach().clone() for b in table_of(supernet).lora_B]
    generator = torch.Generator().manual_seed(0)
    space = supernet.space
    for subnet in (space.max, space.min, *(space.sample(generator) for _ in range(3))):
        with supernet.activate(subnet), torch.no_grad():
            found = logits_of(supernet(**inputs()))
        expected = logits_of(supernet.extract(subnet).eval()(**inputs()))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    for b in table_of(supernet).lora_B:
        b.data.zero_()
    assert not torch.allclose(whole, logits_of(supernet(**inputs())))  # the stages had an effect
    assert all(b.any() for b in before)


@every_model
def test_rows_of_a_batch_have_sizes_of_their_own(name: str, suffix: str) -> None:
    supernet = adapted(name, suffix)
    batch = inputs()
    count = len(batch["input_ids"])
    sizes = [supernet.space.max if i % 2 else supernet.space.min for i in range(count)]
    with supernet.activate_rows(sizes), torch.no_grad():
        found = logits_of(supernet(**batch))
    for i, size in enumerate(sizes):
        with supernet.activate(size), torch.no_grad():
            alone = logits_of(supernet(**{key: value[i : i + 1] for key, value in batch.items()}))
        torch.testing.assert_close(found[i : i + 1], alone, rtol=1e-4, atol=1e-5)


def test_all_weights_train_without_them() -> None:
    supernet = adapted("bert", "ForSequenceClassification", effect=False)
    supernet.train_stage(0, base=True)
    table = table_of(supernet)
    assert table.own_weight.requires_grad and not table.trained_stages
    logits_of(supernet(**inputs())).sum().backward()
    assert table.own_weight.grad.any() and all(p.grad is None for p in table.lora_A)


@pytest.mark.parametrize("ids", [torch.tensor([[1, 2, 2]]), torch.empty((0, 3), dtype=torch.long), torch.tensor(5)])
@pytest.mark.parametrize("width", [None, 1, 7, 10])
def test_lookups_and_their_gradients_are_those_of_the_formula(ids: torch.Tensor, width: int | None) -> None:
    torch.manual_seed(0)
    layer = ElasticEmbedding.from_embedding(nn.Embedding(12, 10, dtype=torch.float64), rank=3, stages=2, alpha=6.0)
    layer.train_stage(1)
    for b in layer.lora_B:
        nn.init.normal_(b)
    parameters = [layer.lora_A[0], layer.lora_B[0], layer.lora_A[1], layer.lora_B[1]]
    n = 10 if width is None else width
    a0, b0, a1, b1 = (p.detach().clone().requires_grad_(True) for p in parameters)
    full = layer.own_weight.detach() + 2.0 * (a0.t() @ b0.t() + a1.t() @ b1.t())
    expected = full[ids][..., :n]
    found = layer(ids, features=width)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(layer.extract(width)(ids), expected)
    ones = torch.randn_like(expected)
    wanted = torch.autograd.grad(expected, (a1, b1), ones)
    gradients = torch.autograd.grad(found, parameters[2:], ones)
    for one, other in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(one, other)
    assert not parameters[0].requires_grad and not parameters[1].requires_grad


@every_model
@pytest.mark.parametrize("order", ["gradient", "magnitude"])
def test_ordering_leaves_what_the_whole_model_computes(name: str, suffix: str, order: str) -> None:
    supernet = adapted(name, suffix)
    before = logits_of(supernet(**inputs()))
    supernet.order(order, [{**inputs(), "labels": inputs()["input_ids"]}] if suffix == "ForCausalLM" else [
        {**inputs(), "labels": torch.zeros(len(inputs()["input_ids"]), dtype=torch.long)}
    ])  # fmt: skip
    assert supernet.permutation
    torch.testing.assert_close(logits_of(supernet(**inputs())), before, rtol=1e-4, atol=1e-5)


def test_a_rotation_leaves_what_the_whole_model_computes() -> None:
    supernet = adapted("llama", "ForCausalLM").double()
    before = logits_of(supernet(**inputs()))
    width = supernet.dimensions.hidden
    supernet.apply_rotation(torch.linalg.qr(torch.randn(width, width, dtype=torch.float64))[0])
    torch.testing.assert_close(logits_of(supernet(**inputs())), before, rtol=1e-4, atol=1e-5)  # norms are fp32


@every_model
def test_stages_are_saved_restored_and_carried(name: str, suffix: str, tmp_path: Path) -> None:
    supernet = adapted(name, suffix)
    supernet.save_pretrained(tmp_path)
    again = SuperTransformer.from_pretrained(tmp_path, make(name, suffix))
    assert again.adapt_embeddings
    assert_same(own(supernet), own(again))
    assert any("embed" in key or "wte" in key for key in own(again) if "lora_B" in key)
    fresh = SuperTransformer(copy.deepcopy(make(name, suffix)), rank=2, adapt_embeddings=True)
    fresh.load_state_dict(supernet.state_dict())
    assert_same(own(supernet), own(fresh))
    torch.testing.assert_close(logits_of(fresh.eval()(**inputs())), logits_of(supernet(**inputs())))
    without = SuperTransformer(copy.deepcopy(make(name, suffix)), rank=2)
    with pytest.raises(MLFSError, match="another rank"):
        without.load_state_dict(supernet.state_dict())
    with pytest.raises(MLFSError, match="adapt_embeddings"):
        without.restore(tmp_path)


@every_model
def test_merged_stages_of_the_other_layers_leave_them(name: str, suffix: str) -> None:
    supernet = adapted(name, suffix)
    before = logits_of(supernet(**inputs()))
    supernet.merge_stages(2)
    torch.testing.assert_close(logits_of(supernet(**inputs())), before, rtol=1e-4, atol=1e-5)
    supernet.merge_stages(0)
    torch.testing.assert_close(logits_of(supernet(**inputs())), before, rtol=1e-4, atol=1e-5)


@every_model
def test_a_run_trains_saves_and_resumes_them(name: str, suffix: str, tmp_path: Path) -> None:
    def supernet() -> SuperTransformer:
        return SuperTransformer(copy.deepcopy(make(name, suffix)), SPACE, rank=2, adapt_embeddings=True)

    t = trainer(tmp_path / "a", name, suffix, supernet=supernet(), stage_steps=[3], teacher="frozen")
    t.train()
    key = next(key for key, p in t.supernet.model.named_parameters() if p is table_of(t.supernet).lora_B[2])
    assert own(t.supernet)[key].any()
    resumed = trainer(tmp_path / "a", name, suffix, supernet=supernet(), stage_steps=[3], teacher="frozen")
    resumed.train(resume_from_checkpoint=True)
    assert_same(own(t.supernet), own(resumed.supernet))


def test_whoever_reads_the_table_gets_what_is_looked_up() -> None:
    supernet = adapted("bert", "ForSequenceClassification")
    table = table_of(supernet)
    ids = torch.arange(table.num_embeddings)
    torch.testing.assert_close(table.computed_weight(), table(ids))
    with supernet.activate(supernet.space.min):
        torch.testing.assert_close(table.computed_weight(), table(ids))


@pytest.mark.parametrize("options", [{"rank": -1}, {"rank": 11}, {"rank": 1, "stages": -1}])
def test_stages_that_cannot_be_are_refused(options: dict[str, int]) -> None:
    with pytest.raises(MLFSError, match="expected 0 <= rank <= 10"):
        ElasticEmbedding.from_embedding(nn.Embedding(12, 10), **options)
