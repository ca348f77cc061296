"""Super-transformers whose blocks run unfused, and the backend for CPUs."""

import pytest

import mlfs.models.convert
from mlfs.ops.backend import use_backend
from tests.supernets import elastic


@pytest.fixture
def unfused(monkeypatch):
    """A function that makes a super-transformer whose blocks all run as transformers wrote them."""

    def make_one(*args, **kwargs):
        with monkeypatch.context() as patch:
            patch.setattr(mlfs.models.convert, "fused_forward", lambda module, spec: None)
            return elastic(*args, **kwargs)

    return make_one


@pytest.fixture
def compiled():
    """The backend for CPUs; its module."""
    module = pytest.importorskip("mlfs._cpu", reason="the C++ extension is not built")
    with use_backend("cpp"):
        yield module
