"""Gradients of gradients: those of plain PyTorch, or refused; never others."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import mlfs.ops  # noqa: F401
from mlfs import MLFSError, SuperTransformer
from mlfs.elastic import ElasticLayerNorm, ElasticLinear, ElasticRMSNorm
from mlfs.elastic.joint import project
from mlfs.ops.attention import ragged_attention, ranges_of_sequences
from mlfs.ops.backend import use_backend
from mlfs.ops.distill import feature_distance
from mlfs.ops.grouped_linear import Group, grouped_sliced_linear
from mlfs.ops.head_loss import head_loss
from mlfs.ops.rotary import rotary
from tests.tiny_models import make

REFUSED = 'use_backend\\("autograd"\\)'


def layer(out: int, columns: int, dtype: torch.dtype) -> ElasticLinear:
    made = ElasticLinear.from_linear(nn.Linear(columns, out, dtype=dtype), rank=2, stages=1)
    nn.init.normal_(made.lora_B[0], std=0.3)
    return made


def operators(dtype: torch.dtype) -> dict[str, Callable[[Tensor], Tensor]]:
    """Of each operator that has gradients, a scalar function of x (2, 5, 24) that is not linear."""
    torch.manual_seed(0)
    up, gate = layer(24, 24, dtype), layer(24, 24, dtype)
    norm = ElasticLayerNorm.from_layer_norm(nn.LayerNorm(24, dtype=dtype))
    rms = ElasticRMSNorm.from_rms_norm(nn.RMSNorm(24, eps=1e-6, dtype=dtype))
    head, teacher = torch.randn(30, 24, dtype=dtype), torch.randn(2, 5, 24, dtype=dtype)
    labels, projection = torch.randint(0, 30, (2, 5)), torch.randn(6, 24, dtype=dtype)
    rows = [Group(0, 4, 12, (0, 10)), Group(4, 6, 16, (0, 8, 12, 6))]
    ranges = ranges_of_sequences([5])
    ranges = torch.cat([ranges, ranges + torch.tensor([1, 0, 0, 0, 0, 0])])
    cos, sin = torch.rand(2, 1, 5, 6, dtype=dtype)

    def heads(x: Tensor) -> Tensor:
        return x.view(2, 5, 4, 6)

    return {
        "sliced_linear": lambda x: up(x, 18).square().sum(),
        "activation": lambda x: up(x, 18, activation="gelu").square().sum(),
        "joint_linear": lambda x: sum(y.square().sum() for y in project(x, up, gate)),
        "add_norm": lambda x: norm.after(x, residual=2 * x)[0].pow(3).sum(),
        "rms_norm": lambda x: rms(x).pow(3).sum(),
        "grouped": lambda x: grouped_sliced_linear(x.flatten(0, 1), up.reads_now(), rows).square().sum(),
        "head_loss": lambda x: head_loss(x, head, None, labels, teacher, 0.5)[0],
        "feature_distance": lambda x: feature_distance(x, teacher, projection),
        "ragged_attention": lambda x: ragged_attention(heads(x), heads(x), heads(2 * x), ranges, 0.3).square().sum(),
        "rotary": lambda x: rotary(heads(x), heads(x), cos, sin)[0].pow(3).sum(),
    }


def second(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """The gradient of the sum of squares of the gradient."""
    x = x.clone().requires_grad_()
    (slope,) = torch.autograd.grad(function(x), x, create_graph=True)
    return torch.autograd.grad(slope.square().sum(), x)[0]


def by_differences(function: Callable[[Tensor], Tensor], x: Tensor, step: float = 1e-5) -> Tensor:
    """The same from first gradients: of ‖g(x)‖² along v = g(x) it is 2 H g, and H g = (g(x + εg) − g(x − εg)) / 2ε."""

    def slope(at: Tensor) -> Tensor:
        at = at.clone().requires_grad_()
        return torch.autograd.grad(function(at), at)[0]

    along = slope(x)
    return (slope(x + step * along) - slope(x - step * along)) / step


@pytest.mark.parametrize("name", operators(torch.float64))
def test_they_are_right_in_plain_pytorch(name: str) -> None:
    x = torch.randn(2, 5, 24, dtype=torch.float64) / 4
    function = operators(torch.float64)[name]
    with use_backend("autograd"):
        torch.testing.assert_close(second(function, x), by_differences(function, x), rtol=1e-4, atol=1e-5)


# Attention is an operator of the extension's alone; elsewhere it is PyTorch's.
CASES = [
    (name, backend)
    for name in operators(torch.float32)
    for backend in ("cpp", "reference", "triton")
    if name != "ragged_attention" or backend == "cpp"
]


@pytest.mark.parametrize(("name", "backend"), CASES)
def test_operators_have_them_or_refuse_them_in_one_line(name: str, backend: str) -> None:
    x, function = torch.randn(2, 5, 24), operators(torch.float32)[name]
    if name == "rotary" or (backend == "reference" and name in ("add_norm", "rms_norm")):  # plain PyTorch, or linear
        with use_backend(backend):
            found = second(function, x)
        with use_backend("autograd"):
            torch.testing.assert_close(found, second(function, x), rtol=1e-4, atol=1e-4)
        return
    with use_backend(backend), pytest.raises(MLFSError, match=REFUSED) as raised:
        second(function, x)
    assert "\n" not in str(raised.value)


def test_every_operator_with_gradients_is_here() -> None:
    named = {"mlfs::sliced_linear", "mlfs::joint_linear", "mlfs::add_norm", "mlfs::grouped_sliced_linear",
             "mlfs::head_loss", "mlfs::feature_distance", "mlfs::ragged_attention", "mlfs::rotary",
             "mlfs::feed_forward"}  # the last one in whole models, below  # fmt: skip
    there = {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("mlfs::")}
    assert {name.partition(".")[0] for name in there if not name.partition(".")[0].endswith("_backward")} == named


def penalty(model: nn.Module, embeds: Tensor) -> Tensor:
    """A gradient penalty's gradient over the embeddings, (batch, tokens, hidden)."""
    embeds = embeds.clone().requires_grad_()
    loss = model(inputs_embeds=embeds).logits.square().mean()
    (slope,) = torch.autograd.grad(loss, embeds, create_graph=True)
    return torch.autograd.grad(slope.square().sum(), embeds)[0]


@pytest.mark.parametrize("family", ["bert-ForSequenceClassification", "llama-ForCausalLM", "gpt2-LMHeadModel"])
def test_a_gradient_penalty_on_a_model(family: str) -> None:
    supernet = SuperTransformer(make(*family.split("-")).double(), rank=2).eval()
    supernet.model.set_attn_implementation("eager")  # PyTorch's fused attention has no second gradients
    for module in supernet.elastic():
        for b in getattr(module, "lora_B", ()):
            nn.init.normal_(b, std=0.1)
    subnet = supernet.space.min
    small = supernet.extract(subnet).eval()
    small.set_attn_implementation("eager")
    embeds = torch.randn(2, 5, subnet.hidden, dtype=torch.float64)
    with supernet.activate(subnet):
        with use_backend("autograd"):
            found = penalty(supernet, embeds)
        torch.testing.assert_close(found, penalty(small, embeds))
        with pytest.raises(MLFSError, match=REFUSED):
            penalty(supernet, embeds)
