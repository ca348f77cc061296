"""A run recognises the base it was trained on, and refuses every other."""

import pytest
import torch
import transformers as tf

from mlfs import MLFSError, SuperTransformer
from mlfs.elastic.base import Elastic
from tests.helpers.runs import load, logits
from tests.supernets import elastic, space_of
from tests.tiny_models import CASES, make


def test_a_trained_norm_is_saved_and_the_base_still_recognised(tmp_path):
    supernet = SuperTransformer(make("bert", "ForSequenceClassification"), space_of("bert"), rank=4).eval()
    supernet.train_stage(1, norms=True)
    with torch.no_grad():
        supernet.get_submodule("model.bert.embeddings.LayerNorm").weight.mul_(1.5)
    supernet.save_pretrained(tmp_path)
    twin = load(tmp_path)
    assert torch.equal(logits(twin), logits(supernet))


def other_weight(model: tf.PreTrainedModel) -> None:
    model.bert.encoder.layer[3].output.dense.weight.data[0, 0] += 1e-3


def other_norm(model: tf.PreTrainedModel) -> None:
    model.bert.embeddings.LayerNorm.bias.data[3] = 0.5


@pytest.mark.parametrize("change", [other_weight, other_norm])
def test_wrong_base_is_refused_and_named(saved, change):
    _, folder = saved
    model = make("bert", "ForSequenceClassification")
    change(model)
    message = r"the base is not the one .* was trained on .*1 of \d+ tensors differ, e\.g\. bert"
    with pytest.raises(MLFSError, match=message) as raised:
        SuperTransformer.from_pretrained(folder, model=model)
    assert "\n" not in str(raised.value)
    assert not any(isinstance(module, Elastic) for module in model.modules()), "a refused base is left as it was"
    assert all(parameter.requires_grad for parameter in model.parameters())
    supernet = SuperTransformer(model, space_of("bert", per_layer=True), rank=4, alpha=8.0)
    before = {key: value.clone() for key, value in supernet.state_dict().items()}
    with pytest.raises(MLFSError, match="the base is not the one"):
        supernet.restore(folder)
    assert all(torch.equal(before[key], value) for key, value in supernet.state_dict().items())


def test_base_of_other_sizes_or_family_is_refused(saved):
    _, folder = saved
    config = CASES["bert"].config()
    config.intermediate_size = 64
    with pytest.raises(MLFSError, match="the base is not the one"):
        SuperTransformer.from_pretrained(folder, model=tf.BertForSequenceClassification(config))
    with pytest.raises(MLFSError, match="trained on a BertForSequenceClassification, the base given is a LlamaFor"):
        SuperTransformer.from_pretrained(folder, model=make("llama", "ForSequenceClassification"))


def test_base_with_parameters_more_is_refused(tmp_path):
    elastic("llama", "ForCausalLM").save_pretrained(tmp_path)
    config = CASES["llama"].config()
    config.attention_bias = True
    model = tf.LlamaForCausalLM(config)
    model.load_state_dict(make("llama", "ForCausalLM").state_dict(), strict=False)
    with pytest.raises(MLFSError, match=r"the base is not the one .*differ, e\.g\. model\.layers\.0\.self_attn.*bias"):
        SuperTransformer.from_pretrained(tmp_path, model=model)
    assert not any(isinstance(module, Elastic) for module in model.modules())


def test_another_head_is_no_other_base_but_must_fit(saved):
    """The head belongs to the run, so its values do not matter; its size does."""
    supernet, folder = saved
    model = make("bert", "ForSequenceClassification")
    model.classifier.weight.data.zero_()
    assert torch.equal(logits(SuperTransformer.from_pretrained(folder, model=model).eval()), logits(supernet))
    config = CASES["bert"].config()
    config.num_labels = 7
    wide = tf.BertForSequenceClassification(config)
    wide.bert.load_state_dict(make("bert", "ForSequenceClassification").bert.state_dict())
    with pytest.raises(MLFSError, match=r"tensor classifier\.weight has shape \(2, 48\), the model has \(7, 48\)"):
        SuperTransformer.from_pretrained(folder, model=wide)
