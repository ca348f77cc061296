"""What blocks of layers ask of the device, and an encoder's layer in one call."""

import pytest
import torch

from mlfs.ops.actions import fuses_activations, trains_fused
from mlfs.ops.attention import ranges_of_sequences
from mlfs.ops.backend import use_backend
from mlfs.ops.encoder_layer import EncoderLayer, encoder_layer
from mlfs.ops.layer import LowRankLinear, Norm

X = torch.ones(2, 3)


def test_activations_are_fused_wherever_there_are_kernels():
    with use_backend("reference"):
        assert not fuses_activations(X)
    pytest.importorskip("triton")
    with use_backend("triton"):
        assert fuses_activations(X)


def test_training_on_kernels_is_told_from_inference_and_from_other_backends():
    with use_backend("reference"):
        assert not trains_fused(X)
    pytest.importorskip("triton")
    with use_backend("triton"):
        assert trains_fused(X)
        with torch.no_grad():
            assert not trains_fused(X)


def encoder_layer_of(size: int) -> EncoderLayer:
    linear = LowRankLinear(torch.ones(size, size), None, [], [], [], [0, size])
    norm = Norm(torch.ones(size), torch.zeros(size), 1e-5, rms=False)
    return EncoderLayer(
        query=linear, key=linear, value=linear, out=linear, norm=norm, up=linear, activation="gelu", down=linear,
        last_norm=norm, head_dim=2, scale=0.5,
    )  # fmt: skip


def test_a_layer_is_one_call_without_gradients_and_where_the_extension_is():
    pytest.importorskip("mlfs._cpu", reason="the C++ extension is not built")
    x, layer, ranges = torch.randn(1, 3, 4), encoder_layer_of(4), ranges_of_sequences([3])
    assert encoder_layer(x, layer, ranges) is None
    with torch.no_grad():
        y = encoder_layer(x, layer, ranges)
        assert y is not None and y.shape == x.shape
        assert encoder_layer(x.bfloat16(), layer, ranges) is None
        with torch.autocast("cpu", torch.bfloat16):
            assert encoder_layer(x, layer, ranges) is None
        with use_backend("reference"):
            assert encoder_layer(x, layer, ranges) is None
