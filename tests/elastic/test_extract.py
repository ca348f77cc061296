"""A free-standing layer gives the plain layer of any of its sizes, which computes what it does at that size."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.pytorch_utils import Conv1D

from mlfs.elastic import ElasticEmbedding, ElasticLayerNorm, ElasticLinear, ElasticRMSNorm
from mlfs.errors import MLFSError


def linear(plain: nn.Module, stages: int = 2) -> ElasticLinear:
    made = ElasticLinear.from_linear(plain.double(), rank=3, stages=stages)
    for stage in range(stages):
        made.train_stage(stage)
        nn.init.normal_(made.lora_B[stage])
    return made


@pytest.mark.parametrize("plain", [nn.Linear(9, 12), nn.Linear(9, 12, bias=False), Conv1D(12, 9)], ids=repr)
@given(out=st.none() | st.integers(1, 12), columns=st.none() | st.integers(1, 9))
def test_a_linear_layer_of_any_size(plain, out, columns):
    made = linear(plain)
    x = torch.randn(4, columns or 9, dtype=torch.float64)
    small = made.extract(out_features=out, in_features=columns)
    assert type(small) is type(plain) and small(x).shape == (4, out or 12)
    torch.testing.assert_close(small(x), made(x, out_features=out))
    assert small.weight.data_ptr() != made.weight.data_ptr()


@pytest.mark.parametrize(
    "plain",
    [nn.LayerNorm(8), nn.LayerNorm(8, bias=False), nn.LayerNorm(8, elementwise_affine=False), nn.RMSNorm(8, eps=1e-5),
     LlamaRMSNorm(8)],
    ids=repr,
)  # fmt: skip
@pytest.mark.parametrize("features", [None, 1, 5, 8])
def test_a_norm_of_any_width(plain, features):
    kind = ElasticLayerNorm.from_layer_norm if isinstance(plain, nn.LayerNorm) else ElasticRMSNorm.from_rms_norm
    for parameter in plain.parameters():
        nn.init.normal_(parameter)
    made = kind(plain)
    small, x = made.extract(features), torch.randn(3, features or 8)
    assert type(small) is type(plain)
    torch.testing.assert_close(small(x), made(x))
    assert [p.shape for p in small.parameters()] == [(features or 8,)] * len(list(plain.parameters()))


@pytest.mark.parametrize("features", [None, 1, 6])
def test_an_embedding_of_any_width(features):
    plain = nn.Embedding(7, 6, padding_idx=2)
    made, ids = ElasticEmbedding.from_embedding(plain), torch.tensor([[1, 2], [6, 0]])
    small = made.extract(features)
    assert type(small) is nn.Embedding and small.embedding_dim == (features or 6) and small.padding_idx == 2
    assert torch.equal(small(ids), made(ids, features=features))


@pytest.mark.parametrize("size", [0, -1, 99, 2.5, "3", True])
def test_sizes_that_are_not_there_are_refused(size):
    made = linear(nn.Linear(9, 12))
    for options, full in (({"out_features": size}, 12), ({"in_features": size}, 9)):
        with pytest.raises(MLFSError, match=f"{next(iter(options))}={size!r}: expected 1 to {full}"):
            made.extract(**options)
    for layer in (ElasticEmbedding.from_embedding(nn.Embedding(7, 6)), ElasticRMSNorm.from_rms_norm(nn.RMSNorm(6))):
        with pytest.raises(MLFSError, match=f"features={size!r}: expected 1 to 6"):
            layer.extract(size)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_layer_that_was_moved_to_another_type_is_extracted_in_it(dtype):
    made = linear(nn.Linear(9, 12)).to(dtype)
    small, x = made.extract(out_features=5, in_features=6), torch.randn(3, 6, dtype=dtype)
    assert small.weight.dtype == dtype
    torch.testing.assert_close(small(x), made(x, out_features=5), rtol=2e-2, atol=2e-2)
