"""An exported folder holds a whole transformers checkpoint, or what it held before."""

import errno
import os
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedTokenizerFast

from mlfs import MLFSError, Subnet
from mlfs.deploy.hf import write_checkpoint
from mlfs.deploy.model_card import model_card
from tests.helpers.rotations import orthogonal
from tests.supernets import distance, elastic, subnets_of
from tests.tiny_models import inputs, logits_of

UNIFORM = subnets_of("bert")["uniform"]


@pytest.fixture(scope="module")
def supernet():
    return elastic("bert", "ForSequenceClassification")


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"[UNK]": 0}, "[UNK]")))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_checkpoint_gives_the_subnets_logits_and_has_its_tokenizer_and_card(supernet, tokenizer, tmp_path):
    folder = tmp_path / "new" / "small"
    write_checkpoint(supernet, UNIFORM, tokenizer, folder)
    small = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    with torch.no_grad(), supernet.activate(UNIFORM):
        assert distance(logits_of(small(**inputs())), logits_of(supernet(**inputs()))) < 1e-5
    assert AutoTokenizer.from_pretrained(folder).get_vocab() == {"[UNK]": 0}
    assert UNIFORM.to_json() in (folder / "README.md").read_text(encoding="utf-8")
    assert os.listdir(folder.parent) == ["small"]


def test_the_card_of_a_rotated_base_says_that_its_head_is_untied_and_what_that_adds():
    tied = elastic("llama-tied", "ForCausalLM")
    subnet = subnets_of("llama-tied")["uniform"]
    assert "tied" not in model_card(tied, subnet, tied.extract(subnet))
    tied.apply_rotation(orthogonal())
    small = tied.extract(subnet)
    size = small.lm_head.weight.nbytes
    assert f"lm_head.weight is not tied to the embeddings: {size:,} bytes more." in model_card(tied, subnet, small)


def test_a_second_export_replaces_the_first_whole(supernet, tokenizer, tmp_path):
    folder = tmp_path / "small"
    folder.mkdir()
    (folder / "left over").touch()
    write_checkpoint(supernet, supernet.space.max, tokenizer, folder)
    assert "left over" not in contents(folder) and "model.safetensors" in contents(folder)


@pytest.mark.parametrize("part", ["tokenizer", "card"])
def test_a_write_that_fails_leaves_what_was_there(supernet, tokenizer, tmp_path, monkeypatch, part):
    folder = tmp_path / "small"
    write_checkpoint(supernet, supernet.space.max, tokenizer, folder)
    before = contents(folder)

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if part == "tokenizer":
        monkeypatch.setattr(tokenizer, "save_pretrained", full)
    else:
        monkeypatch.setattr("mlfs.deploy.hf.model_card", full)
    with pytest.raises(MLFSError, match=r"could not write .*No space left .*export elsewhere") as raised:
        write_checkpoint(supernet, UNIFORM, tokenizer, folder)
    assert "\n" not in str(raised.value)
    assert contents(folder) == before and os.listdir(tmp_path) == ["small"]


def test_a_subnet_that_no_configuration_states_is_refused_before_anything_is_written(supernet, tokenizer, tmp_path):
    subnet = Subnet(48, 4, 24, (0, 2, 3))
    with pytest.raises(MLFSError, match="the nearest subnet that can be saved is"):
        write_checkpoint(supernet, subnet, tokenizer, tmp_path / "small")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("name", "suffix", "auto"),
    [
        ("bert", "ForSequenceClassification", "AutoModelForSequenceClassification"),
        ("llama", "ForCausalLM", "AutoModelForCausalLM"),
    ],
)
def test_the_card_names_base_sizes_and_how_to_load_it(name, suffix, auto):
    model = elastic(name, suffix)
    model.base_name = "someone/base"
    subnet = subnets_of(name)["uniform"]
    small = model.extract(subnet)
    card = model_card(model, subnet, small)
    assert card.startswith("---\nlibrary_name: transformers\nbase_model: someone/base\n")
    assert f"from transformers import {auto}, AutoTokenizer" in card
    assert f"3 of 4 layers, hidden size {subnet.hidden}" in card and subnet.to_json() in card
