"""Who counts, traces or transforms what runs gets what plain PyTorch gives: counts, other inputs, derivatives."""

from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, hessian, jvp, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from mlfs import SuperTransformer
from mlfs.elastic import ElasticLayerNorm, ElasticLinear, ElasticRMSNorm
from mlfs.elastic.joint import feed_forward, project
from mlfs.ops import feature_distance, head_loss
from mlfs.ops.attention import ragged_attention, ranges_of_sequences
from mlfs.ops.backend import use_backend
from mlfs.ops.grouped_linear import Group, grouped_sliced_linear
from mlfs.ops.rotary import rotary
from tests.supernets import distance, elastic, space_of, subnets_of
from tests.tiny_models import inputs, logits_of, make

MODELS = [
    ("bert", "ForSequenceClassification"),
    ("distilbert", "ForTokenClassification"),
    ("gpt2", "LMHeadModel"),
    ("gpt_neox", "ForCausalLM"),
    ("llama", "ForCausalLM"),
]
some_models = pytest.mark.parametrize(("name", "suffix"), MODELS)


def flops_of(run) -> int:
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


pytestmark = [pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.torch.jit:DeprecationWarning")]


@some_models
def test_counted_operations_are_those_of_plain_pytorch(name, suffix):
    supernet, subnet = elastic(name, suffix), subnets_of(name)["uniform"]

    def step() -> None:
        supernet.zero_grad()
        with supernet.activate(subnet):
            logits_of(supernet(**inputs())).square().mean().backward()

    counted = flops_of(step)
    with use_backend("autograd"):  # every product is one of PyTorch's, which it counts by itself
        assert counted == flops_of(step) > 0


@some_models
def test_a_subnet_without_adapters_counts_what_its_extracted_model_counts(name, suffix):
    supernet, subnet = (
        SuperTransformer(make(name, suffix), space_of(name), stages=0).eval(),
        subnets_of(name)["uniform"],
    )
    small = supernet.extract(subnet)
    with torch.no_grad(), supernet.activate(subnet):
        counted = flops_of(lambda: supernet(**inputs()))
        assert counted == flops_of(lambda: small(**inputs())) > 0


def test_each_module_is_counted_for_itself():
    supernet = SuperTransformer(make("bert", "ForSequenceClassification"), space_of("bert"), stages=0).eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        supernet(**inputs())
    per_module = {place: sum(counts.values()) for place, counts in counter.get_flop_counts().items()}
    query = next(place for place in per_module if place.endswith("layer.0.attention.self.query"))
    assert per_module[query] == 2 * inputs()["input_ids"].numel() * 48 * 48


def layer(rows: int, columns: int, stages: int = 2, dtype: torch.dtype = torch.float32) -> ElasticLinear:
    made = ElasticLinear.from_linear(nn.Linear(columns, rows, dtype=dtype), rank=3, stages=stages)
    for stage in range(stages):
        made.train_stage(stage)
        nn.init.normal_(made.lora_B[stage], std=0.1)
    return made


def operators() -> dict[str, Callable[[], Tensor]]:
    """Of each operator a call that gives one number."""
    x = torch.randn(2, 5, 16, requires_grad=True)
    up, gate, down = layer(24, 20), layer(24, 20), layer(16, 24)
    rows = [Group(0, 4, 12, (0, 10)), Group(4, 6, 16, (0, 8, 12, 6))]
    labels, teacher = torch.randint(0, 30, (2, 5)), torch.randn(2, 5, 20)
    q, k, v = (torch.randn(2, 5, heads, 8, requires_grad=True) for heads in (4, 2, 2))
    ranges = torch.cat([ranges_of_sequences([5]), ranges_of_sequences([5]) + torch.tensor([1, 0, 0, 0, 0, 0])])
    return {
        "sliced_linear": lambda: up(x, 18).square().sum(),
        "joint_linear": lambda: sum(y.square().sum() for y in project(x, up, gate)),
        "gated": lambda: project(x, up, gate, gated=True)[0].square().sum(),
        "feed_forward": lambda: feed_forward(x, [up], down, "gelu")[0].square().sum(),
        "gated feed_forward": lambda: feed_forward(x, [gate, up], down, "silu_mul", residual=x)[0].square().sum(),
        "grouped": lambda: grouped_sliced_linear(x.flatten(0, 1), layer(24, 16).reads_now(), rows).square().sum(),
        "head_loss": lambda: head_loss(x, torch.ones(30, 20), None, labels, teacher, 0.5)[0],
        "feature_distance": lambda: feature_distance(x, teacher, torch.ones(6, 20, requires_grad=True)),
        "ragged_attention": lambda: ragged_attention(q, k, v, ranges, 0.3).square().sum(),
        "rotary": lambda: rotary(q, k, torch.ones(1, 5, 8), torch.ones(1, 5, 8))[0].square().sum(),
    }


@pytest.mark.parametrize("backend", ["cpp", "reference"])
@pytest.mark.parametrize("name", operators())
def test_an_operator_counts_as_many_operations_as_its_formula(name, backend):
    run = operators()[name]

    def counts() -> tuple[int, int]:
        return flops_of(torch.no_grad()(run)), flops_of(lambda: run().backward())

    with use_backend(backend):
        counted = counts()
    with use_backend("autograd"):
        forward, both = counts()
    if name == "ragged_attention" and backend == "cpp":  # computes q kᵀ again, as flash attention, which counts it
        both = forward + (both - forward) * 5 // 4
    assert counted == (forward, both)
    assert counted[0] > 0 or name == "rotary"


def test_attention_counts_what_pytorch_counts_for_its_own_kernels():
    q, k, v = (torch.randn(2, 5, 4, 8, requires_grad=True) for _ in range(3))
    ranges = torch.cat([ranges_of_sequences([5]), ranges_of_sequences([5]) + torch.tensor([1, 0, 0, 0, 0, 0])])
    shape = torch.Size((2, 4, 5, 8))  # as PyTorch has them: (rows, heads, tokens, dim)
    forward, backward = sdpa_flop_count(shape, shape, shape), sdpa_backward_flop_count(shape, shape, shape, shape)
    with use_backend("cpp"):
        assert flops_of(lambda: ragged_attention(q, k, v, ranges, 0.3)) == forward
        both = flops_of(lambda: ragged_attention(q, k, v, ranges, 0.3).square().sum().backward())
    assert both == forward + backward


class Logits(nn.Module):
    """A model as tracers take it: tensors in, one tensor out."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return logits_of(self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False))


def trace_by_jit(model: nn.Module, example: tuple[Tensor, ...]) -> Callable[..., Tensor]:
    return torch.jit.trace(model, example, check_trace=False, strict=False)


def trace_by_fx(model: nn.Module, example: tuple[Tensor, ...]) -> Callable[..., Tensor]:
    return make_fx(model, tracing_mode="symbolic", _allow_non_fake_inputs=True)(*example)


@pytest.mark.parametrize("trace", [trace_by_jit, trace_by_fx])
@pytest.mark.parametrize(("name", "suffix"), [*MODELS, ("qwen3", "ForCausalLM")])
def test_a_trace_computes_other_inputs_of_other_lengths(name, suffix, trace):
    supernet, subnet = elastic(name, suffix, torch.float64), subnets_of(name)["uniform"]
    small = Logits(supernet.extract(subnet))
    with torch.no_grad():
        with supernet.activate(subnet):
            traced = trace(Logits(supernet), tuple(inputs().values()))
        ids, mask = (t.flip(0) for t in inputs(seed=1).values())  # outside: the trace has its size
        for length in (11, 7):
            assert distance(traced(ids[:, :length], mask[:, :length]), small(ids[:, :length], mask[:, :length])) < 1e-12


@pytest.mark.parametrize("trace", [trace_by_jit, trace_by_fx])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_traced_layer_is_no_constant(trace, dtype):
    made, norm = layer(12, 8, dtype=dtype), ElasticLayerNorm.from_layer_norm(nn.LayerNorm(12, dtype=dtype))
    example, other = torch.randn(3, 8, dtype=dtype), torch.randn(5, 8, dtype=dtype)
    with torch.no_grad():
        traced = trace(nn.Sequential(made, norm), (example,))
        torch.testing.assert_close(traced(other), norm(made(other)))
        assert not torch.equal(traced(other), traced(other.flip(0)))


def blocks() -> dict[str, tuple[nn.Module, nn.Module]]:
    """Elastic layers, and what they are in plain PyTorch, of 8 numbers."""
    made, rms = layer(12, 8, dtype=torch.float64), nn.RMSNorm(8, eps=1e-6, dtype=torch.float64)
    norm = nn.LayerNorm(8, dtype=torch.float64)
    plain = nn.Linear(8, 12, dtype=torch.float64)
    plain.weight.data, plain.bias.data = made.merged_weight().detach(), made.bias.detach()
    return {
        "linear": (made, plain),
        "layer norm": (ElasticLayerNorm.from_layer_norm(norm), norm),
        "rms norm": (ElasticRMSNorm.from_rms_norm(rms), rms),
    }


TRANSFORMS = {
    "grad": lambda run, x: grad(run)(x),
    "jvp": lambda run, x: jvp(run, (x,), (x.cos(),))[1],
    "hessian": lambda run, x: hessian(run)(x),
    "vmap": lambda run, x: vmap(run)(x),
    "grad of each row": lambda run, x: vmap(grad(run))(x),
    "grad of grad": lambda run, x: grad(lambda x: grad(run)(x).square().sum())(x),
}


@pytest.mark.parametrize("backend", [None, "cpp", "reference"])
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("kind", blocks())
def test_transforms_give_the_derivatives_of_the_plain_layer(kind, transform, backend):
    made, plain = blocks()[kind]
    x = torch.randn(4, 8, dtype=torch.float64)
    with nullcontext() if backend is None else use_backend(backend):
        actual, expected = (
            TRANSFORMS[transform](lambda x, module=module: module(x).pow(3).sum(), x) for module in (made, plain)
        )
    torch.testing.assert_close(actual, expected)


def test_gradients_of_each_sample_by_functional_call():
    made = layer(12, 8)
    x, trained = torch.randn(4, 8), {name: p for name, p in made.named_parameters() if p.requires_grad}
    each = vmap(grad(lambda values, x: functional_call(made, values, (x,)).square().sum()), in_dims=(None, 0))
    actual = each(trained, x)
    for i, row in enumerate(x):
        made.zero_grad()
        made(row).square().sum().backward()
        for name, parameter in trained.items():
            torch.testing.assert_close(actual[name][i], parameter.grad)
