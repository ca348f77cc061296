"""Who multiplies with a layer's weight itself reads what the layer computes with; everybody else the parameter."""

import types
import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from mlfs import MLFSError, SuperTransformer
from mlfs.elastic import ElasticLayerNorm, ElasticLinear
from mlfs.elastic.base import Elastic
from mlfs.elastic.readers import READERS
from tests.supernets import elastic as super_transformer
from tests.supernets import subnets_of
from tests.tiny_models import CASES, make


def elastic(module: nn.Linear) -> ElasticLinear:
    made = ElasticLinear.from_linear(module, rank=2)
    nn.init.normal_(made.lora_B[0], std=0.3)
    return made


def encoder_layer() -> nn.TransformerEncoderLayer:
    torch.manual_seed(0)
    return nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, batch_first=True)


@pytest.mark.parametrize("whole", [True, False], ids=["layer", "encoder"])
def test_pytorchs_encoder_layer_computes_with_the_stages_on_its_fast_path(whole: bool, monkeypatch) -> None:
    layer, x = encoder_layer(), torch.randn(2, 5, 16)
    plain = layer(x)
    layer.linear1, layer.linear2 = elastic(layer.linear1), elastic(layer.linear2)
    layer.self_attn.out_proj = elastic(layer.self_attn.out_proj)
    layer.norm1 = ElasticLayerNorm.from_layer_norm(layer.norm1)
    taken = []
    fast = torch._transformer_encoder_layer_fwd
    monkeypatch.setattr(torch, "_transformer_encoder_layer_fwd", lambda *args: taken.append(1) or fast(*args))
    model = nn.TransformerEncoder(layer, 2) if whole else layer
    expected = model(x)  # with gradients: modules are called
    assert not taken and (expected - plain).abs().max() > 0.1
    model.eval().requires_grad_(False)
    with torch.no_grad():
        torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
    assert taken


@pytest.mark.parametrize("training", [True, False])
def test_pytorchs_attention_computes_with_the_stages_of_its_output(training: bool) -> None:
    torch.manual_seed(0)
    attention, x = nn.MultiheadAttention(16, 4, batch_first=True), torch.randn(2, 5, 16)
    made = attention.out_proj = elastic(attention.out_proj)
    attention.train(training)
    found = attention(x, x, x)[0]
    found.square().sum().backward()
    gradient = made.lora_B[0].grad.clone()
    attention.out_proj, made.lora_B[0].grad = nn.Identity(), None
    attention.out_proj.weight, attention.out_proj.bias = torch.eye(16), torch.zeros(16)
    expected = made(attention(x, x, x)[0])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    expected.square().sum().backward()
    torch.testing.assert_close(gradient, made.lora_B[0].grad, rtol=1e-4, atol=1e-4)


def read_in(module: str, layer: nn.Module) -> tuple[Tensor, Tensor | None]:
    """Reads a layer's weight and bias in a module of that name."""
    reader = types.ModuleType(module)
    exec("def read(layer):\n    return layer.weight, layer.bias", vars(reader))
    return reader.read(layer)


@pytest.mark.parametrize("module", ["trl.trainer.utils", "liger_kernel.transformers.model.llama", "cut_cross_entropy"])
@pytest.mark.parametrize("family", ["llama", "llama-tied", "gpt2", "gpt_neox", "gpt_bigcode-mqa"])
def test_losses_that_multiply_with_the_heads_weight_have_it_at_every_size(module: str, family: str) -> None:
    suffix = next(suffix for suffix in CASES[family].classes if suffix.endswith(("ForCausalLM", "LMHeadModel")))
    supernet = super_transformer(family, suffix)
    ids = torch.randint(3, 40, (2, 6))
    for subnet in subnets_of(family).values():
        with supernet.activate(subnet):
            output = supernet(ids, output_hidden_states=True)
            weight, bias = read_in(module, supernet.get_output_embeddings())
            torch.testing.assert_close(linear(output.hidden_states[-1], weight, bias), output.logits)


def test_everybody_else_reads_the_parameter() -> None:
    supernet = SuperTransformer(make("llama", "ForCausalLM"), rank=2)
    for subnet in (supernet.space.max, supernet.space.min):
        with supernet.activate(subnet):
            for name, module in supernet.model.named_modules():
                if isinstance(module, Elastic):
                    assert module.weight is module.own_weight is supernet.model.get_parameter(f"{name}.weight")
                    assert read_in("torch.distributed.fsdp", module)[0] is module.own_weight
                    assert read_in("trlx", module)[0] is module.own_weight
    assert all(reader.partition(".")[0] in ("torch", "trl", "liger_kernel", "cut_cross_entropy") for reader in READERS)


def test_code_that_may_multiply_with_the_parameter_is_told_once_where_it_reads() -> None:
    layer = elastic(nn.Linear(6, 5))
    with pytest.warns(UserWarning, match=r"take computed_weight\(\)") as told:
        for _ in range(3):
            read_in("somebody.losses", layer)
    assert {warning.filename for warning in told} == {"<string>"}  # where it is read
    supernet = SuperTransformer(make("llama", "ForCausalLM"), rank=2)
    head = supernet.get_output_embeddings()
    with supernet.activate(supernet.space.min), pytest.warns(UserWarning, match=r"take computed_weight\(\)"):
        assert read_in("somebody.losses", head)[0] is head.own_weight
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read_in("somebody.losses", head)  # of the full size, without stages
        read_in("somebody.losses", ElasticLinear.from_linear(nn.Linear(6, 5), rank=0))
        for known in ("torch.distributed.fsdp", "accelerate.utils.modeling", "transformers.modeling_utils", "trl.x"):
            read_in(known, layer)
        assert layer.own_weight is layer.get_parameter("weight")


@pytest.mark.parametrize(("family", "suffix"), [(name, case.classes[0]) for name, case in CASES.items()])
def test_computed_weights_are_those_of_the_extracted_layers(family: str, suffix: str) -> None:
    supernet = super_transformer(family, suffix)
    for subnet in subnets_of(family).values():
        sizes = supernet.layer_sizes(subnet)
        with supernet.activate(subnet):
            for name, module in supernet.model.named_modules():
                if not isinstance(module, Elastic) or 0 in getattr(module, "read_sizes", lambda sizes: ())(sizes):
                    continue  # a layer that the subnet leaves out
                plain = module.extract_at(sizes)
                torch.testing.assert_close(module.computed_weight(), plain.weight, msg=name)
                if getattr(plain, "bias", None) is not None:
                    torch.testing.assert_close(module.computed_bias(), plain.bias, msg=name)


def test_gradients_go_through_a_computed_weight() -> None:
    layer, x = elastic(nn.Linear(6, 5)), torch.randn(3, 6)
    layer(x).square().sum().backward()
    expected = [layer.lora_A[0].grad, layer.lora_B[0].grad]
    layer.zero_grad(set_to_none=True)
    linear(x, layer.computed_weight(), layer.computed_bias()).square().sum().backward()
    for a, b in zip([layer.lora_A[0].grad, layer.lora_B[0].grad], expected, strict=True):
        torch.testing.assert_close(a, b)


def test_rows_of_different_sizes_have_no_one_weight() -> None:
    supernet = SuperTransformer(make("bert", "ForSequenceClassification"), rank=2)
    layer = supernet.model.bert.encoder.layer[0].intermediate.dense
    with supernet.activate_rows([supernet.space.max, supernet.space.min]):
        with pytest.raises(MLFSError, match=r"each row has a size of its own here, and a weight one"):
            layer.computed_weight()
        assert layer.weight is layer.own_weight


def test_what_is_compiled_reads_what_the_layer_computes_with() -> None:
    torch.manual_seed(0)
    layer, x = elastic(nn.Linear(6, 5)), torch.randn(3, 6)
    compiled = torch.compile(lambda x: linear(x, layer.weight, layer.bias), fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), layer(x))
    model, x = encoder_layer(), torch.randn(2, 5, 16)
    model.linear1 = elastic(model.linear1)
    expected = model(x)
    model.eval().requires_grad_(False)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="eager")(x), expected)
