"""The table of implementations, and layers as values: what a further backend and torch.library's edge rely on."""

import pytest
import torch
from torch import Tensor

from mlfs.ops import backend
from mlfs.ops.backend import use_backend
from mlfs.ops.backends import table
from mlfs.ops.backends.table import Backend, add_backend, implements
from mlfs.ops.layer import ACTIVATIONS, Epilogue, LowRankLinear, flatten, unflatten
from mlfs.ops.sliced_linear import sliced_linear, sliced_linear_reference
from tests.calls import example
from tests.projections import case


@pytest.fixture
def further(monkeypatch):
    """A backend that takes only products without stages; what it ran."""
    for name in ("BACKENDS", "_IMPLEMENTATIONS"):
        monkeypatch.setattr(table, name, dict(getattr(table, name)))
    monkeypatch.setattr(table, "ASKED", list(table.ASKED))
    monkeypatch.setattr(backend, "_forced", None)
    ran: list[int] = []
    takes = lambda x, others: x.dtype == torch.float64  # noqa: E731
    add_backend(Backend("further", lambda: None, takes, lambda x, others: None))

    @implements("further", "linear_forward")
    def linear_forward(x: Tensor, layer: LowRankLinear, epilogue: Epilogue, keep: bool):
        ran.append(len(layer.lora_a))
        if layer.lora_a:
            return NotImplemented
        y = sliced_linear_reference(x, layer, epilogue)
        return y + 1, x.new_empty(0), x.new_empty(0)

    return ran


def test_a_further_backend_runs_what_it_has_and_the_reference_what_it_refuses(further):
    taken, refused = example(stages=0), example(stages=2)
    torch.testing.assert_close(taken(sliced_linear), taken.dense() + 1)
    torch.testing.assert_close(refused(sliced_linear), refused.dense())
    assert further == [0, 2]
    assert backend.backend_of(taken.x) == "further" and backend.backend_of(taken.x.float()) != "further"
    call = refused.trains(stages=(0,))
    call(sliced_linear).sum().backward()  # by the reference: the backend lacks it
    assert call.lora_a[0].grad is not None
    with use_backend("reference"):
        torch.testing.assert_close(taken(sliced_linear), taken.dense())
    with use_backend("further"):
        assert backend.backend_of(taken.x.float()) == "further"


@pytest.mark.parametrize("stages", [0, 1, 3])
@pytest.mark.parametrize("bias", [True, False])
def test_layers_laid_out_and_put_together_again_are_the_same(stages, bias):
    _, layers = case(stages=stages, bias=bias)
    for given, found in zip(layers, unflatten(*flatten(layers)), strict=True):
        assert found.weight is given.weight and found.bias is given.bias
        assert all(a is b for a, b in zip(found.tensors, given.tensors, strict=True))
        assert list(found.scales) == list(given.scales) and list(found.spans) == list(given.spans)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("stages", [0, 2])
@pytest.mark.parametrize("wants", [False, True])
def test_an_action_of_one_layer_is_its_formula_whichever_way_it_goes(activation, stages, wants):
    from mlfs.ops.actions import linear

    call = example(torch.float32, activation=activation, stages=stages, residual=True)
    with torch.set_grad_enabled(wants):
        torch.testing.assert_close(call(linear).double(), call.dense(), rtol=1e-4, atol=1e-4)
