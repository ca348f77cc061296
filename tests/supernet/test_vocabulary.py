"""Tokens that a base did not have: added before, their rows are kept in the run; later, they are refused."""

from pathlib import Path

import pytest
import torch
import transformers as tf
from torch import nn

from mlfs import MLFSError, SuperTransformer
from tests.helpers.runs import exportable, logits, same_tensors, stored
from tests.supernets import distance, elastic, perturb, space_of, subnets_of
from tests.tiny_models import CASES, VOCABULARY, inputs, logits_of, make

MODELS = [(name, case.classes[0]) for name, case in CASES.items()]
MODELS += [("bert", "ForMaskedLM"), ("llama", "ForSequenceClassification")]
LARGER, SMALLER = VOCABULARY + 7, VOCABULARY - 5


def resized(name: str, suffix: str, folder: Path, count: int, seed: int) -> tf.PreTrainedModel:
    """The base of a folder, with as many tokens; the rows of new ones are drawn."""
    model = getattr(tf, CASES[name].name + suffix).from_pretrained(folder)
    torch.manual_seed(seed)
    model.resize_token_embeddings(count)
    for end in (model.get_input_embeddings(), model.get_output_embeddings()):
        if end is not None:
            nn.init.normal_(end.weight.data[VOCABULARY:], std=0.3)
    return model.eval()


@pytest.mark.parametrize("count", [LARGER, SMALLER], ids=["larger", "smaller"])
@pytest.mark.parametrize(("name", "suffix"), MODELS)
def test_a_run_on_a_resized_base_loads_again(name, suffix, count, tmp_path):
    base, run = tmp_path / "base", tmp_path / "run"
    make(name, suffix).save_pretrained(base)

    def fresh(seed: int) -> SuperTransformer:
        return SuperTransformer(resized(name, suffix, base, count, seed), space_of(name), rank=4)

    supernet = perturb(fresh(1)).eval()
    supernet.order("magnitude")
    supernet.save_pretrained(run)
    kept = {key: value.shape[0] for key, value in stored(run).items() if key.endswith("added_rows")}
    assert set(kept.values()) == {max(count - VOCABULARY, 0)}, "the base's own rows are not saved"
    plain = getattr(tf, CASES[name].name + suffix).from_pretrained(base)
    twins = [
        SuperTransformer.from_pretrained(run, model=m) for m in (None, plain, resized(name, suffix, base, count, 2))
    ]
    twins += [fresh(3), fresh(4)]
    twins[-2].restore(run)
    twins[-1].load_state_dict(supernet.state_dict())
    batch = inputs("left")
    batch["input_ids"] = batch["input_ids"].clamp(max=count - 1)
    batch["input_ids"][:, -2] = count - 1
    for twin in twins:
        assert twin.config.vocab_size == count
        for subnet in list(subnets_of(name).values())[:4]:
            outputs = []
            for model in (twin.eval(), supernet):
                with torch.no_grad(), model.activate(subnet):
                    outputs.append(logits_of(model(**batch)))
            assert torch.equal(*outputs)
    twins[-1].save_pretrained(tmp_path / "again")
    assert same_tensors(stored(tmp_path / "again"), stored(run))
    small = exportable(name)[1]
    twins[0].extract(small).save_pretrained(tmp_path / "small")
    exported = getattr(tf, CASES[name].name + suffix).from_pretrained(tmp_path / "small").eval()
    with torch.no_grad(), supernet.activate(small):
        assert distance(logits_of(exported(**batch)), logits_of(supernet(**batch))) < 1e-5


@pytest.mark.parametrize(("name", "suffix"), [("llama", "ForCausalLM"), ("gpt2", "LMHeadModel")])
def test_a_padding_token_that_the_base_did_not_have(name, suffix, tmp_path):
    """As everyone gives one to a decoder without: the base cannot be loaded under a configuration that names it."""
    model = make(name, suffix)
    model.config.pad_token_id = None
    model.save_pretrained(tmp_path / "base")
    base = resized(name, suffix, tmp_path / "base", VOCABULARY + 1, 1)
    base.config.pad_token_id = VOCABULARY
    supernet = perturb(SuperTransformer(base, space_of(name), rank=4)).eval()
    supernet.save_pretrained(tmp_path / "run")
    twin = SuperTransformer.from_pretrained(tmp_path / "run").eval()
    assert twin.config.pad_token_id == VOCABULARY
    assert torch.equal(logits(twin), logits(supernet))


def test_another_base_is_still_refused(tmp_path):
    make("llama", "ForCausalLM").save_pretrained(tmp_path / "base")
    base = resized("llama", "ForCausalLM", tmp_path / "base", LARGER, 1)
    SuperTransformer(base, space_of("llama"), rank=4).save_pretrained(tmp_path / "run")
    other = make("llama", "ForCausalLM")
    other.get_input_embeddings().weight.data[3, 3] += 1
    with pytest.raises(MLFSError, match=r"the base is not the one .* 1 of \d+ tensors differ, e\.g\. model\.embed"):
        SuperTransformer.from_pretrained(tmp_path / "run", model=other)


@pytest.mark.parametrize(("name", "suffix"), [("bert", "ForMaskedLM"), ("llama-tied", "ForCausalLM")])
def test_tokens_are_not_added_to_what_is_elastic(name, suffix):
    supernet = elastic(name, suffix)
    before = logits(supernet)
    for model in (supernet, supernet.model, supernet.bound(supernet.space.min)):
        for found in (model.resize_token_embeddings(VOCABULARY), model.resize_token_embeddings()):
            assert getattr(found, "module", found) is supernet.get_input_embeddings()  # a bound subnet's is bound
        actions = [
            lambda model=model: model.resize_token_embeddings(LARGER),
            lambda model=model: model.resize_token_embeddings(VOCABULARY, pad_to_multiple_of=8),
            lambda model=model: model.set_input_embeddings(nn.Embedding(LARGER, 48)),
            lambda model=model: model.set_output_embeddings(nn.Linear(48, LARGER)),
        ]
        for action in actions:
            with pytest.raises(MLFSError, match=r"add tokens and resize before SuperTransformer\(model\)") as raised:
                action()
            assert "\n" not in str(raised.value)
    assert torch.equal(logits(supernet), before)
