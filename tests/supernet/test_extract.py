"""Extracted models: what can be saved as a checkpoint, and what it holds."""

import json

import pytest
import torch
from safetensors.torch import load_file

from mlfs import MLFSError, SearchSpace, Subnet, SuperTransformer
from tests.helpers.runs import exportable, logits
from tests.supernets import distance, elastic
from tests.tiny_models import CASES, inputs, logits_of, make


@pytest.mark.parametrize(
    ("name", "subnet", "reason", "nearest"),
    [
        ("bert", Subnet(48, 4, 24, (0, 2, 3)), "hidden_size / num_attention_heads wide", Subnet(32, 4, 24, (0, 2, 3))),
        ("gpt2", Subnet(16, 6, 16, (1, 3)), "hidden_size / num_attention_heads wide", Subnet(16, 2, 16, (1, 3))),
        ("bert", Subnet(32, (4, 2), 24, (1, 3)), "its layers differ in size", Subnet(32, 4, 24, (1, 3))),
        ("llama", Subnet(48, 6, (40, 40, 24), (0, 2, 3)), "its layers differ in size", Subnet(48, 6, 40, (0, 2, 3))),
        ("qwen2", Subnet(40, (4, 2), 24, (1, 3)), "its layers differ in size", None),
        ("llama", Subnet(32, 6, 24, (1, 3)), "must be a multiple of num_attention_heads", Subnet(24, 6, 24, (1, 3))),
    ],
)
def test_unexportable_subnet_works_in_memory_but_is_not_saved(name, subnet, reason, nearest, tmp_path):
    supernet = elastic(name, CASES[name].classes[0])
    small = supernet.extract(subnet)
    with torch.no_grad():
        assert distance(logits_of(small(**inputs("left"))), logits(supernet, subnet)) < 1e-5
    for save in (small.save_pretrained, small.push_to_hub):
        with pytest.raises(MLFSError, match=reason) as raised:
            save(str(tmp_path / "export"))
        text = str(raised.value)
        assert "\n" not in text and subnet.to_json() in text
        named = Subnet.from_json(text.rpartition("the nearest subnet that can be saved is ")[2])
        assert named == nearest or nearest is None
        assert named in supernet.space and supernet.is_exportable(named) and named.layers == subnet.layers
    assert list(tmp_path.iterdir()) == []
    supernet.extract(named).save_pretrained(tmp_path / "export")
    assert (tmp_path / "export" / "config.json").exists()


def test_a_space_without_any_exportable_subnet_of_that_depth_says_so(tmp_path):
    space = SearchSpace((48, 40), (6,), (40,), ((0, 1, 2, 3), (0, 2)))
    supernet = SuperTransformer(make("bert", "ForSequenceClassification"), space, rank=2)
    small = supernet.extract(Subnet(40, 6, 40, (0, 2)))
    with pytest.raises(MLFSError, match=r'the nearest subnet that can be saved is {"hidden": 48, "heads": 6'):
        small.save_pretrained(tmp_path / "export")


def test_modules_of_the_checkpoint_know_nothing_of_the_run(tmp_path):
    supernet = elastic("llama", "ForCausalLM")
    supernet.extract(exportable("llama")[1]).save_pretrained(tmp_path)
    text = (tmp_path / "config.json").read_text() + (tmp_path / "generation_config.json").read_text()
    assert "mlfs" not in text and "lora" not in text
    stored = load_file(tmp_path / "model.safetensors")
    assert not any("lora" in key for key in stored)
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["hidden_size"], config["num_attention_heads"], config["num_key_value_heads"]) == (32, 4, 2)
    assert (config["intermediate_size"], config["num_hidden_layers"], config["head_dim"]) == (16, 3, 8)
