"""What other libraries would do to an elastic model, or have done to a base: refused in one line with the way out."""

import copy
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
import transformers as tf
from torch import nn

from mlfs import ElasticLinear, MLFSError, SuperTransformer
from mlfs.elastic.base import Elastic
from tests.helpers.runs import logits
from tests.supernets import distance, elastic, space_of
from tests.tiny_models import inputs, make

LORA = peft.LoraConfig(target_modules=["query", "value"])


def refused(action: Callable[[], object], message: str) -> None:
    with pytest.raises(MLFSError, match=message) as raised:
        action()
    assert "\n" not in str(raised.value)


# ---- PEFT -------------------------------------------------------------------------------------------------------

AROUND: dict[str, Callable[[SuperTransformer], object]] = {
    "LoRA": lambda supernet: peft.get_peft_model(supernet, LORA),
    "LoRA in the model": lambda supernet: peft.get_peft_model(supernet.model, LORA),
    "LoRA of all": lambda supernet: peft.get_peft_model(supernet, peft.LoraConfig(target_modules="all-linear")),
    "norms": lambda supernet: peft.get_peft_model(supernet, peft.LNTuningConfig(target_modules=["LayerNorm"])),
    "prompts": lambda supernet: peft.get_peft_model(
        supernet, peft.PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=3)
    ),
    "injected": lambda supernet: peft.inject_adapter_in_model(LORA, supernet),
    "a layer": lambda supernet: peft.inject_adapter_in_model(
        peft.LNTuningConfig(target_modules=["1"]), nn.Sequential(nn.Identity(), supernet.get_submodule(NORM))
    ),
    "transformers' add": lambda supernet: supernet.add_adapter(LORA),
    "transformers' load": lambda supernet: supernet.load_adapter("somewhere"),
}
NORM = "model.bert.embeddings.LayerNorm"


@pytest.mark.parametrize("wrap", AROUND.values(), ids=AROUND.keys())
def test_peft_around_a_super_transformer_is_refused_and_changes_nothing(wrap):
    supernet = elastic("bert", "ForSequenceClassification")
    kinds = [type(module) for module in supernet.modules()]
    trains, before = [p.requires_grad for p in supernet.parameters()], logits(supernet)
    refused(lambda: wrap(supernet), r"train these \(train_stage\), or give PEFT the plain model that extract")
    assert [type(module) for module in supernet.modules()] == kinds
    assert [p.requires_grad for p in supernet.parameters()] == trains
    assert torch.equal(logits(supernet), before)


def test_peft_works_on_what_is_extracted():
    supernet = elastic("bert", "ForSequenceClassification")
    small = supernet.extract(supernet.space.min)
    with torch.no_grad():
        wrapped = peft.get_peft_model(small, LORA).eval()(**inputs("left")).logits
    assert distance(wrapped, logits(supernet, supernet.space.min)) < 1e-5


def _injected(model: tf.PreTrainedModel) -> Any:
    model.add_adapter(LORA)
    return model


WRAPPED: dict[str, Callable[[tf.PreTrainedModel], Any]] = {
    "LoRA": lambda model: peft.get_peft_model(model, LORA),
    "the model in it": lambda model: peft.get_peft_model(model, LORA).get_base_model(),
    "prompts": lambda model: peft.get_peft_model(
        model, peft.PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=3)
    ),
    "added": _injected,
}


@pytest.mark.parametrize("wrap", WRAPPED.values(), ids=WRAPPED.keys())
def test_a_base_that_peft_has_wrapped_is_refused(wrap):
    model = wrap(make("bert", "ForSequenceClassification"))
    refused(lambda: SuperTransformer(model, space_of("bert"), rank=4), r"take the plain model .*merge_and_unload\(\)")


def test_what_merge_and_unload_returns_is_made_elastic():
    wrapped = peft.get_peft_model(make("bert", "ForSequenceClassification"), LORA).eval()
    for module in wrapped.modules():
        if isinstance(module, peft.tuners.lora.Linear):
            nn.init.normal_(module.lora_B["default"].weight, std=0.1)
    with torch.no_grad():
        expected = wrapped(**inputs("left")).logits
    supernet = SuperTransformer(wrapped.merge_and_unload(), space_of("bert"), rank=4).eval()
    assert distance(logits(supernet), expected) < 1e-5


# ---- quantisation -----------------------------------------------------------------------------------------------


def _as_torchao(model: nn.Module, by: str) -> None:
    """Walks a model as torchao does, which is no dependency here; it takes its next steps at modules it knows."""
    code = {
        "named_children": "def walk(m):\n    for name, child in list(m.named_children()): walk(child)",
        "named_modules": "def walk(m): dict(m.named_modules())",
    }[by]
    space: dict[str, Any] = {"__name__": "torchao.quantization.quant_api"}
    exec(code, space)
    space["walk"](model)


def _prepare(model: nn.Module) -> None:
    model.qconfig = torch.ao.quantization.default_qconfig
    torch.ao.quantization.prepare(model)


QUANTISERS: dict[str, Callable[[Any], object]] = {
    "dynamic": lambda model: torch.ao.quantization.quantize_dynamic(model, {nn.Linear}),
    "dynamic, in place": lambda model: torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, inplace=True),
    "dynamic, all it knows": lambda model: torch.ao.quantization.quantize_dynamic(model),
    "static": _prepare,
    "torchao": lambda model: _as_torchao(model, "named_children"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("quantise", QUANTISERS.values(), ids=QUANTISERS.keys())
@pytest.mark.parametrize("part", ["all", "the model", "a layer of it", "a layer of one's own"])
def test_quantising_what_is_elastic_is_refused(quantise, part):
    supernet = elastic("bert", "ForSequenceClassification")
    target = {
        "all": supernet,
        "the model": supernet.model,
        "a layer of it": supernet.layers[0],
        "a layer of one's own": nn.Sequential(ElasticLinear.from_linear(nn.Linear(8, 8), rank=2)),
    }[part]
    before = logits(supernet)
    refused(lambda: quantise(target), r"quantising \w+ is not supported: quantise the plain model or layer")
    assert torch.equal(logits(supernet), before)


def test_torchao_by_names_is_refused_too():
    supernet = elastic("bert", "ForSequenceClassification")
    for model in (supernet, supernet.model):
        refused(lambda model=model: _as_torchao(model, "named_modules"), "quantising .* is not supported")
    _as_torchao(supernet.extract(supernet.space.min), "named_modules")


@pytest.mark.filterwarnings("ignore")
def test_what_is_extracted_is_quantised():
    supernet = elastic("bert", "ForSequenceClassification")
    small = torch.ao.quantization.quantize_dynamic(supernet.extract(supernet.space.max), {nn.Linear})
    assert any("quantized" in type(module).__module__ for module in small.modules())
    with torch.no_grad():
        assert distance(small(**inputs("left")).logits, logits(supernet)) < 0.2


def _quantised(model: tf.PreTrainedModel) -> None:
    torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, inplace=True)


def _one_quantised(model: tf.PreTrainedModel) -> None:
    layer = model.bert.encoder.layer[2].output
    layer.dense = torch.ao.quantization.quantize_dynamic(nn.Sequential(layer.dense), {nn.Linear})[0]


def _kept_in_buffers(model: tf.PreTrainedModel) -> None:
    """As GPTQ and AWQ keep them: packed integers and scales, in buffers."""

    class QuantLinear(nn.Module):
        def __init__(self, linear: nn.Linear) -> None:
            super().__init__()
            self.in_features, self.out_features = linear.in_features, linear.out_features
            self.register_buffer("qweight", linear.weight.detach().mul(64).round().to(torch.int8))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x @ (self.qweight.to(x.dtype) / 64).t()

    layer = model.bert.encoder.layer[1].attention.self
    layer.key = QuantLinear(layer.key)


class Packed(torch.Tensor):
    """A tensor that is something else than it says, as those of quantisers are."""


def _of_another_kind(model: tf.PreTrainedModel) -> None:
    dense = model.bert.pooler.dense
    dense.weight = nn.Parameter(dense.weight.detach().as_subclass(Packed), requires_grad=False)


def _integers(model: tf.PreTrainedModel) -> None:
    norm = model.bert.embeddings.LayerNorm
    norm.weight = nn.Parameter(norm.weight.detach().to(torch.int8), requires_grad=False)


NOT_PLAIN = {
    _quantised: "module 'bert.encoder.layer.0.attention.self.query'.* has no parameters: .* load the model in fp32",
    _one_quantised: "module 'bert.encoder.layer.2.output.dense'.* has no parameters",
    _kept_in_buffers: r"module 'bert.encoder.layer.1.attention.self.key' \(QuantLinear\) has no parameters",
    _of_another_kind: r"parameter bert.pooler.dense.weight is Packed, not a plain tensor of floating-point",
    _integers: r"parameter bert.embeddings.LayerNorm.weight is Tensor, not a plain tensor of floating-point",
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("change", NOT_PLAIN, ids=lambda change: change.__name__.strip("_"))
def test_a_base_whose_weights_are_no_plain_parameters_is_refused_as_it_is(change):
    model = make("bert", "ForSequenceClassification")
    change(model)
    kinds, trains = [type(m) for m in model.modules()], [p.requires_grad for p in model.parameters()]
    refused(lambda: SuperTransformer(model, space_of("bert"), rank=4), NOT_PLAIN[change])
    assert [type(m) for m in model.modules()] == kinds and [p.requires_grad for p in model.parameters()] == trains
    assert not any(isinstance(module, Elastic) for module in copy.copy(model).modules())
