"""Micro-benchmarks of the operators: pytest bench --benchmark-only (or `make bench`).

A sliced product with its adapters against the dense product of the same size, and what switching subnets costs.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from mlfs import SearchSpace, SuperTransformer
from mlfs.ops import rms_norm, sliced_linear, sliced_linear_reference
from mlfs.ops.layer import LowRankLinear

TOKENS, FULL = 512, (1536, 384)
SIZES = {"full": (1536, 384), "half": (768, 192)}


@pytest.fixture(params=list(SIZES))
def tensors(request: Any) -> dict[str, Any]:
    m, n = SIZES[request.param]
    torch.manual_seed(0)
    weight, bias = torch.randn(FULL), torch.randn(FULL[0])
    return {
        "x": torch.randn(TOKENS, n, requires_grad=True),
        "weight": weight,
        "bias": bias,
        "a": [torch.randn(8, FULL[1], requires_grad=True)],
        "b": [torch.randn(FULL[0], 8, requires_grad=True)],
        "m": m,
        "dense": weight[:m, :n].contiguous(),
    }


def step(function: Callable[[], torch.Tensor]) -> Callable[[], None]:
    """Forward and backward."""

    def run() -> None:
        function().sum().backward()

    return run


def test_dense_product(tensors: dict[str, Any], benchmark: Any) -> None:
    m, x = tensors["m"], tensors["x"]
    benchmark(step(lambda: torch.nn.functional.linear(x, tensors["dense"], tensors["bias"][:m])))


@pytest.mark.parametrize("op", [sliced_linear, sliced_linear_reference], ids=["operator", "reference"])
def test_sliced_product_with_adapter(op: Any, tensors: dict[str, Any], benchmark: Any) -> None:
    t = tensors
    layer = LowRankLinear(t["weight"], t["bias"], t["a"], t["b"], [2.0], [0, t["m"]])
    benchmark(step(lambda: op(t["x"], layer)))


def test_rms_norm(benchmark: Any) -> None:
    x, weight = torch.randn(TOKENS, 192, requires_grad=True), torch.randn(384)
    benchmark(step(lambda: rms_norm(x, weight, 1e-6)))


def test_switching_subnets_of_thirty_layers(benchmark: Any) -> None:
    config = LlamaConfig(vocab_size=100, hidden_size=64, num_attention_heads=4, num_key_value_heads=2,
                         intermediate_size=128, num_hidden_layers=30)  # fmt: skip
    space = SearchSpace((64, 32), (4, 2), (128, 64), (tuple(range(30)), tuple(range(0, 30, 2))))
    supernet = SuperTransformer(LlamaForCausalLM(config), space)

    def switch() -> None:
        with supernet.activate(space.min):
            pass

    benchmark(switch)
