"""What an elastic layer is made from computes what its class says, from weights that are there."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm
from transformers.pytorch_utils import Conv1D

from mlfs import MLFSError, SuperTransformer
from mlfs.elastic import ElasticEmbedding, ElasticLayerNorm, ElasticLinear, ElasticRMSNorm
from tests.tiny_models import make


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class DoubledConv1D(Conv1D):
    def forward(self, x):
        return 2 * super().forward(x)


class DoubledNorm(nn.LayerNorm):
    def forward(self, x):
        return 2 * super().forward(x)


class DoubledEmbedding(nn.Embedding):
    def forward(self, ids):
        return 2 * super().forward(ids)


def patched(module: nn.Module) -> nn.Module:
    own = module.forward
    module.forward = lambda x: 2 * own(x)
    return module


def pruned(module: nn.Module) -> nn.Module:
    return prune.l1_unstructured(module, "weight", 0.5)


COMPUTED: dict[str, tuple[Callable[[nn.Module], nn.Module], str]] = {
    "weight_norm": (weight_norm, r"remove_weight_norm\(module\)"),
    "spectral_norm": (spectral_norm, r"remove_spectral_norm\(module\)"),
    "pruned": (pruned, r"prune.remove\(module"),
    "parametrized by weight_norm": (parametrizations.weight_norm, "remove_parametrizations"),
    "parametrized by spectral_norm": (parametrizations.spectral_norm, "remove_parametrizations"),
    "parametrized to be orthogonal": (parametrizations.orthogonal, "remove_parametrizations"),
}


@pytest.mark.parametrize("how", COMPUTED)
@pytest.mark.parametrize("bias", [True, False])
def test_a_weight_that_is_computed_before_each_call_is_refused(how: str, bias: bool) -> None:
    make_computed, way_out = COMPUTED[how]
    with pytest.raises(MLFSError, match=way_out) as raised:
        ElasticLinear.from_linear(make_computed(nn.Linear(6, 5, bias=bias)), rank=2)
    assert "\n" not in str(raised.value)

    name, family = ("bert", "ForSequenceClassification") if bias else ("llama", "ForCausalLM")
    model = make(name, family)
    linear = next(m for path, m in model.named_modules() if path.endswith(("intermediate.dense", "up_proj")))
    make_computed(linear)
    with pytest.raises(MLFSError, match=rf"(intermediate.dense|up_proj)' .*{way_out}"):
        SuperTransformer(model, rank=2)


def test_the_ways_out_lead_out() -> None:
    x = torch.randn(3, 6)
    for how, remove in {
        "weight_norm": nn.utils.remove_weight_norm,
        "spectral_norm": nn.utils.remove_spectral_norm,
        "pruned": lambda module: prune.remove(module, "weight"),
        "parametrized by weight_norm": lambda m: nn.utils.parametrize.remove_parametrizations(m, "weight"),
    }.items():
        module = COMPUTED[how][0](nn.Linear(6, 5)).eval()
        remove(module)
        torch.testing.assert_close(ElasticLinear.from_linear(module, rank=2)(x), module(x))


MADE_BY = {
    Doubled: ElasticLinear.from_linear,
    DoubledConv1D: ElasticLinear.from_linear,
    DoubledNorm: ElasticLayerNorm.from_layer_norm,
    DoubledEmbedding: ElasticEmbedding.from_embedding,
}


@pytest.mark.parametrize("kind", MADE_BY)
def test_a_class_that_computes_something_else_is_refused(kind: type[nn.Module]) -> None:
    module = kind(6) if kind is DoubledNorm else kind(6, 5)
    with pytest.raises(MLFSError, match=f"{kind.__name__}: computes something else than {kind.__base__.__name__}"):
        MADE_BY[kind](module)


@pytest.mark.parametrize("kind", ["linear", "conv1d", "norm", "rms_norm", "embedding"])
def test_a_forward_pass_that_was_replaced_is_refused(kind: str) -> None:
    module, make_elastic = {
        "linear": (nn.Linear(9, 8), ElasticLinear.from_linear),
        "conv1d": (Conv1D(9, 8), ElasticLinear.from_linear),
        "norm": (nn.LayerNorm(6), ElasticLayerNorm.from_layer_norm),
        "rms_norm": (nn.RMSNorm(6), ElasticRMSNorm.from_rms_norm),
        "embedding": (nn.Embedding(6, 5), ElasticEmbedding.from_embedding),
    }[kind]
    make_elastic(copy.deepcopy(module))
    with pytest.raises(MLFSError, match="its forward pass was replaced"):
        make_elastic(patched(module))


def test_a_lazy_layer_is_refused_until_it_has_a_size() -> None:
    lazy = nn.LazyLinear(5)
    with pytest.raises(MLFSError, match="run a batch through the lazy module first"):
        ElasticLinear.from_linear(lazy, rank=2)
    x = torch.randn(3, 6)
    lazy(x)
    torch.testing.assert_close(ElasticLinear.from_linear(lazy, rank=2)(x), lazy(x))


def test_hooks_of_a_layer_watch_what_stands_for_it() -> None:
    linear, seen = nn.Linear(6, 5), []
    before = linear.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    after = linear.register_forward_hook(
        lambda module, args, kwargs, y: seen.append((type(module).__name__, y.shape)), with_kwargs=True
    )
    x = torch.randn(3, 6)
    elastic = ElasticLinear.from_linear(linear, rank=2)
    torch.testing.assert_close(elastic(x), nn.functional.linear(2 * x, linear.weight, linear.bias))
    assert seen == [("ElasticLinear", (3, 5))]
    plain = elastic.extract()
    torch.testing.assert_close(plain(x), nn.functional.linear(x, linear.weight, linear.bias))
    before.remove(), after.remove()
    torch.testing.assert_close(elastic(x), nn.functional.linear(x, linear.weight, linear.bias))
    assert len(seen) == 1


def test_hooks_of_a_model_stay() -> None:
    model, seen = make("bert", "ForSequenceClassification"), []
    model.enable_input_require_grads()
    model.bert.encoder.layer[0].intermediate.dense.register_forward_hook(lambda m, args, y: seen.append(y.shape[-1]))
    supernet = SuperTransformer(model, rank=2)
    with supernet.activate(supernet.space.min):
        supernet(torch.ones(1, 4, dtype=torch.long))
    assert seen == [supernet.space.min.ffn]
    assert model.get_input_embeddings()(torch.ones(1, 4, dtype=torch.long)).requires_grad
