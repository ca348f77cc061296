"""Fused blocks are looked up by their kind, and run fused only where all that their kind needs is there."""

from dataclasses import dataclass

import pytest
import torch
from transformers.activations import ACT2FN

from mlfs import MLFSError, SuperTransformer
from mlfs.elastic.linear import ElasticLinear
from mlfs.models import convert
from mlfs.models.families.spec import MLP, Activated, GatedMLP
from mlfs.models.families.table import FAMILIES
from mlfs.models.follow import FollowsSubnet
from mlfs.models.fused.forward import check_kind, fused_forward
from tests.tiny_models import make


@dataclass(frozen=True)
class Unheard:
    """A kind of fused block that no file registers."""

    linear: str


def block_of(activation: str, **parts: torch.nn.Module) -> torch.nn.Module:
    """A feed-forward block of elastic layers, unless `parts` has others."""
    linears = {name: ElasticLinear.from_linear(torch.nn.Linear(8, 8), rank=2) for name in ("gate", "up", "down")}
    module = torch.nn.Module()
    for name, part in (linears | {"act": ACT2FN[activation]} | parts).items():
        module.add_module(name, part)
    return module


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.model_type)
def test_every_kind_in_the_table_is_registered(family):
    for block in family.fused.values():
        check_kind(block)


def test_an_unknown_kind_is_refused_by_its_name():
    with pytest.raises(MLFSError, match="kind Unheard: expected one of Activated, AddNorm, GatedMLP, MLP"):
        fused_forward(block_of("gelu"), Unheard("up"))


def test_a_table_with_an_unknown_kind_leaves_the_model_as_it_is(monkeypatch):
    family = next(family for family in FAMILIES if family.model_type == "llama")
    monkeypatch.setitem(family.fused, "mlp", Unheard("up_proj"))
    model = make("llama", "ForCausalLM")
    classes = [type(module) for module in model.modules()]
    trained = [parameter.requires_grad for parameter in model.parameters()]
    with pytest.raises(MLFSError, match="Unheard"):
        SuperTransformer(model)
    assert [type(module) for module in model.modules()] == classes
    assert [parameter.requires_grad for parameter in model.parameters()] == trained
    assert not any(isinstance(module, FollowsSubnet) for module in model.modules())
    monkeypatch.undo()
    SuperTransformer(model)  # it can still be converted


@pytest.mark.parametrize(
    ("block", "activation", "parts"),
    [
        (MLP("up", "act", "down"), "relu", {}),
        (MLP("up", "act", "down"), "silu", {}),  # known, but for gated blocks
        (GatedMLP("gate", "act", "up", "down"), "gelu", {}),
        (Activated("up", "act"), "tanh", {}),
        (MLP("up", "act", "down"), "gelu", {"up": torch.nn.Linear(8, 8)}),
        (GatedMLP("gate", "act", "up", "down"), "silu", {"gate": torch.nn.Linear(8, 8)}),
    ],
)
def test_a_block_without_what_its_kind_needs_runs_as_it_is(block, activation, parts):
    assert fused_forward(block_of(activation, **parts), block) is None


def test_a_part_that_the_module_lacks_is_an_error():
    with pytest.raises(AttributeError, match="missing"):
        fused_forward(block_of("gelu"), MLP("up", "act", "down", dropout="missing"))


def test_modules_of_a_class_have_one_forward_pass():
    block = MLP("up", "act", "down")
    first, second = (fused_forward(block_of("gelu"), block) for _ in range(2))
    assert first is second is not None
    assert fused_forward(block_of("gelu_pytorch_tanh"), block) is not first


def test_conversion_asks_for_the_blocks_of_every_layer(monkeypatch):
    asked = []
    monkeypatch.setattr(convert, "fused_forward", lambda module, block: asked.append(type(block).__name__))
    SuperTransformer(make("llama", "ForCausalLM"))
    assert asked == ["RotaryAttention"] * 4  # the first that cannot run fused is the last that is asked for
