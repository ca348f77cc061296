"""When the compiled operators for CPUs run, and what they refuse."""

import pytest
import torch
from torch import nn

from mlfs import MLFSError
from mlfs.elastic.linear import ElasticLinear
from mlfs.ops import backend
from mlfs.ops.backend import use_backend
from mlfs.ops.backends import cpp
from mlfs.ops.sliced_linear import sliced_linear
from tests.calls import Call
from tests.helpers.norms import add_norm


def test_types_it_does_not_take_are_refused_when_forced_and_go_elsewhere_when_not(monkeypatch):
    half = torch.ones(2, 3, dtype=torch.bfloat16)
    with pytest.raises(MLFSError, match="backend cpp: tensors of bfloat16; expected all float32"):
        add_norm(half, None, None, None, 1e-5, True)
    with pytest.raises(MLFSError, match="backend cpp: tensors of float32, float64"):
        add_norm(half.float(), half.double(), None, None, 1e-5, True)
    monkeypatch.setattr(backend, "_forced", None)

    assert backend.backend_of(half) == backend.backend_of(half.double()) == "reference"
    assert backend.backend_of(half.float(), half) == "reference"
    assert backend.backend_of(half.float(), None, half.float()) == "cpp"
    monkeypatch.setattr(cpp, "why_no_cpp", lambda: "there is no compiler")
    monkeypatch.setattr(cpp, "_WHY_NOT", cpp.why_no_cpp())
    warned: list[str] = []
    monkeypatch.setattr(cpp, "warn_of_plain_pytorch", warned.append)
    assert backend.backend_of(half.float()) == "reference"
    assert warned == ["there is no compiler"]
    with pytest.raises(MLFSError, match="backend cpp is not available: there is no compiler"), use_backend("cpp"):
        pass


def test_without_gradients_the_operator_is_called_directly():
    layer = nn.Linear(20, 30).requires_grad_(False)
    call = Call(torch.randn(4, 20), layer.weight, layer.bias, [], [], [], [0, 30])
    with torch.inference_mode():
        torch.testing.assert_close(call(sliced_linear), layer(call.x))
    assert call(sliced_linear).grad_fn is None


def test_what_does_not_fit_is_refused_where_no_operator_is_between():
    """The kernels would read beyond the end of it."""
    layer = ElasticLinear.from_linear(nn.Linear(20, 30), rank=2)
    x, y = torch.randn(4, 20), torch.randn(4, 30)
    with torch.no_grad():
        with pytest.raises(MLFSError, match="only silu_mul takes an operand"):
            layer(x, activation="silu_mul")
        with pytest.raises(MLFSError, match="expected one of none"):
            layer(x, activation="relu")
        with pytest.raises(RuntimeError, match="operand or residual of"):
            layer(x, residual=y[:2])
        with pytest.raises(RuntimeError, match="differ in shape"):
            add_norm(x, x[:2], None, None, 1e-5, True)
        with pytest.raises(RuntimeError, match="shorter than rows"):
            add_norm(x, None, torch.ones(19), None, 1e-5, True)
