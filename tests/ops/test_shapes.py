"""Nothing that traces mlfs is bound to the lengths it has seen: torch.compile, torch.export."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.supernets import distance, elastic, subnets_of
from tests.tiny_models import VOCABULARY, logits_of

MODELS = [("bert", "ForSequenceClassification"), ("gpt2", "LMHeadModel"), ("llama", "ForCausalLM")]
LENGTHS = (5, 6, 7, 9)


class Logits(nn.Module):
    """A model as exporters take it: tensors in, one tensor out."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return logits_of(self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False))


def batch(rows: int, length: int) -> tuple[Tensor, Tensor]:
    ids = torch.randint(3, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(length))
    return ids, torch.ones_like(ids)


def graphs_of(model: nn.Module, trains: bool) -> int:
    """Compiles a model for `LENGTHS`, one after the other; returns how many graphs that took."""
    graphs: list[Any] = []

    def count(graph: Any, example: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(Logits(model), backend=count)
    for length in LENGTHS:
        with torch.set_grad_enabled(trains):
            out = compiled(*batch(3, length))
        if trains:
            out.square().mean().backward()
    return len(graphs)


@pytest.mark.parametrize(("name", "suffix", "trains"), [(*MODELS[0], False), (*MODELS[0], True), (*MODELS[2], False)])
def test_other_lengths_take_no_more_graphs_than_the_plain_model(name, suffix, trains):
    supernet, subnet = elastic(name, suffix), subnets_of(name)["uniform"]
    supernet.train_stage(2)
    expected = graphs_of(supernet.extract(subnet), trains)
    with supernet.activate(subnet):
        assert graphs_of(supernet, trains) <= expected


@pytest.mark.parametrize(("name", "suffix"), MODELS)
def test_an_exported_program_takes_other_batches(name, suffix):
    supernet, subnet = elastic(name, suffix), subnets_of(name)["uniform"]
    rows, length = torch.export.Dim("rows", min=2, max=64), torch.export.Dim("length", min=2, max=32)
    small = Logits(supernet.extract(subnet).eval())
    with torch.no_grad(), supernet.activate(subnet):
        program = torch.export.export(Logits(supernet), batch(3, 7), dynamic_shapes=[{0: rows, 1: length}] * 2)
    for shape in ((3, 7), (2, 12), (5, 4)):
        with torch.no_grad():
            assert distance(program.module()(*batch(*shape)), small(*batch(*shape))) < 1e-5
    called = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert called and not any("mlfs" in target for target in called)  # it runs where mlfs is not
