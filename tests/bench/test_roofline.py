"""The traffic that bench.static.roofline counts is that of the kernels' loads and stores, and of launches that run."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPTBigCodeConfig,
    GPTBigCodeForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)

from mlfs import SearchSpace, Subnet, SuperTransformer
from mlfs.ops.backend import use_backend
from mlfs.ops.layer import Activated, Dropout, Epilogue, LowRankLinear, Norm, Wanted

pytest.importorskip("triton")
pytest.importorskip("peft")
if torch.cuda.is_available():
    pytest.skip("addresses are seen in Triton's interpreter", allow_module_level=True)

from triton.runtime import interpreter

from bench.static import roofline
from bench.static.lower_bound import LowerBound
from bench.static.traffic import Launch, kernel_launches, memory_traffic, record
from mlfs.kernels import decode, joint, norm, product, rotary


@contextmanager
def addresses() -> Iterator[tuple[dict[int, int], dict[int, int]]]:
    """What is loaded and stored inside the block: size of the number at each address."""
    builder, loads, stores = interpreter.InterpreterBuilder, {}, {}
    load, store = builder.create_masked_load, builder.create_masked_store

    def note(touched: dict[int, int], ptrs: Any, mask: Any) -> None:
        size = ptrs.get_element_ty().primitive_bitwidth // 8
        touched.update(dict.fromkeys(np.unique(ptrs.data[mask.data]).tolist(), size))

    def masked_load(self: Any, ptrs: Any, mask: Any, *more: Any) -> Any:
        note(loads, ptrs, mask)
        return load(self, ptrs, mask, *more)

    def masked_store(self: Any, ptrs: Any, value: Any, mask: Any, *more: Any) -> Any:
        note(stores, ptrs, mask)
        return store(self, ptrs, value, mask, *more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(builder, "create_masked_load", masked_load)
        patch.setattr(builder, "create_masked_store", masked_store)
        yield loads, stores


@contextmanager
def launched(check: bool = True) -> Iterator[list[Launch]]:
    """Launches kernels, too; with `check`, each has to touch the bytes that the count says."""
    seen: list[Launch] = []

    def launch(count: Launch, kernel: Any, grid: tuple[int, ...], arguments: Any) -> None:
        with addresses() as (loads, stores):
            kernel[grid](**arguments)
        if check:
            found = sum(loads.values()), sum(stores.values())
            assert found == (sum(count.reads.values()), sum(count.writes.values())), count
        seen.append(count)

    with kernel_launches("interpreter", launch):
        yield seen


LOW_RANK = {f"reductions.{kernel}" for kernel in ("thin", "thin_reduce", "reduce", "finish")}


def rand(*size: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(size).to(dtype)


@pytest.mark.parametrize("stages", [0, 1, 3])
@pytest.mark.parametrize("spans", [[0, 70], [3, 40, 50, 9, 60, 5]])
@pytest.mark.parametrize("activation", ["none", "gelu", "silu_mul"])
def test_products_touch_the_bytes_that_are_counted(stages, spans, activation):
    tokens, n, m = 67, 75, sum(spans[1::2])
    a, b = [rand(5, 80, dtype=torch.float32) for _ in range(stages)], [rand(70, 5) for _ in range(stages)]
    layer = LowRankLinear(rand(70, 80), rand(70), a, b, [2.0] * stages, spans)
    x, residual, operand = rand(tokens, n), rand(tokens, m), rand(tokens, m) if activation == "silu_mul" else None
    kept, wanted = activation != "none", Wanted([s == stages - 1 for s in range(stages)], True, n)
    with launched() as seen:
        y, h, z = product.forward(x, layer, Epilogue(activation, operand, residual), kept)
        dz = product.activation_backward(rand(tokens, m), z, operand, activation)[0] if kept else y
        product.backward(dz, x, h, layer, wanted, residual=rand(tokens, n) if kept else None)
        if kept:
            activated = Activated(activation, rand(tokens, n), None if operand is None else rand(tokens, n))
            for given in (x, None):
                product.backward_through_activation(dz, given, h, layer, wanted, activated)
        decode.forward(x[:3], layer, Epilogue(activation, None if operand is None else operand[:3]))
    names = {launch.name for launch in seen}
    assert names >= {"product.forward", "product.backward", "decode.parts", "decode.sum"}
    assert ("product.backward_through_activation" in names) == kept
    assert names >= LOW_RANK if stages else not LOW_RANK & names


@pytest.mark.parametrize("stages", [0, 1, 2])
@pytest.mark.parametrize("rows", [(70, 33, 9), (40, 40)])
def test_products_of_one_x_touch_the_bytes_that_are_counted(rows, stages):
    tokens, n, layers, gated = 67, 75, len(rows), len(rows) == 2
    x, trains = rand(tokens, n), [s % max(stages, 1) == 0 for s in range(layers * stages)]
    given = []
    for m in rows:
        a, b = [rand(5, 80) for _ in range(stages)], [rand(m + 1, 5) for _ in range(stages)]
        given.append(LowRankLinear(rand(m + 1, 80), rand(m + 1), a, b, [2.0] * stages, [0, m]))
    with launched() as seen:
        ys, h, _ = joint.forward(x, given, gated, keep=True)
        joint.backward(ys, x, h, given, Wanted(trains, True, n))
    names = {launch.name for launch in seen}
    assert names == {"joint.forward", "joint.backward"} | (LOW_RANK if stages else set())


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("rms", [False, True])
def test_norms_touch_the_bytes_that_are_counted(rms, p):
    x, residual, weight, bias = rand(21, 45), rand(21, 45), rand(50), rand(50)
    with launched() as seen:
        y, s = norm.forward(x, residual, Norm(weight, None if rms else bias, 1e-5, rms), Dropout(p, torch.tensor([7])))
        norm.backward(y, rand(21, 45), s, Norm(weight, None, 1e-5, rms), Dropout(p, torch.tensor([7])), True)
        norm.forward(x, None, Norm(weight, None, 1e-5, True))
    assert len(seen) == 3


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("heads", [(3, 1), (35, 35)])
def test_rotary_embeddings_touch_the_bytes_that_are_counted(heads, rows):
    q, k = (rand(3, 4, count, 10) for count in heads)
    with launched() as seen:
        rotary.rotary(q, k, rand(rows, 4, 10), rand(rows, 4, 10), torch.bfloat16)
    assert [launch.name for launch in seen] == ["rotary.rotary"]


LLAMA = LlamaConfig(hidden_size=48, num_attention_heads=3, num_key_value_heads=1, head_dim=16, intermediate_size=64,
                    num_hidden_layers=3, vocab_size=50)  # fmt: skip
BERT = BertConfig(hidden_size=48, num_attention_heads=3, intermediate_size=64, num_hidden_layers=2, vocab_size=50,
                  hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)  # fmt: skip
SANTA = GPTBigCodeConfig(n_embd=48, n_head=3, n_inner=64, n_layer=3, vocab_size=50, n_positions=16, multi_query=True,
                         attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0, bos_token_id=1, eos_token_id=2)  # fmt: skip
DEEP = SearchSpace(hidden=(48, 32), heads=(3, 2), ffn=(64, 40), layers=((0, 1, 2), (0, 2)))
FLAT = SearchSpace(hidden=(48, 32), heads=(3, 2), ffn=(64, 40), layers=((0, 1), (1,)))


def launches_of(kind: type, config: Any, space: SearchSpace, device: str) -> list[Launch]:
    """Of a pass of the smallest subnet: as they run on a CPU, or as they are counted without numbers."""
    config._attn_implementation = "sdpa" if device == "cpu" else roofline.attention_without_masks()
    with torch.device(device):
        model = kind(config).to(torch.bfloat16)
        ids = torch.zeros(2, 7, dtype=torch.long)
    supernet = SuperTransformer(model, space, rank=4)
    counting = launched(check=False) if device == "cpu" else record("interpreter")
    backend = use_backend("triton") if device == "cpu" else nullcontext()
    with supernet.activate(space.min), backend, counting as launches:
        hidden = supernet.model.base_model(ids, use_cache=False).last_hidden_state
        hidden.backward(torch.ones_like(hidden))
    return [launch for launch in launches if not launch.name.startswith(("torch.", "attention."))]


@pytest.mark.parametrize(
    "kind, config, space",
    [
        (LlamaForCausalLM, LLAMA, DEEP),
        (BertForSequenceClassification, BERT, FLAT),
        (GPTBigCodeForCausalLM, SANTA, DEEP),
    ],
)
def test_a_model_that_runs_launches_what_is_counted_without_numbers(kind, config, space):
    """The same kernels in the same order, each with tensors of the same bytes."""

    def shown(device: str) -> list[tuple[str, list[int], list[int], int]]:
        run = launches_of(kind, config, space, device)
        return [(x.name, list(x.reads.values()), list(x.writes.values()), x.flops) for x in run]

    counted = shown("meta")
    assert counted == shown("cpu")
    names = {name for name, *_ in counted}
    assert names >= {"product.forward", "product.backward", "reductions.reduce", "norm.backward"}
    assert ("joint.backward" in names) == (
        kind is LlamaForCausalLM
    )  # the first layer's query, key and value make no dx


@pytest.mark.parametrize("kind, config", [(LlamaForCausalLM, LLAMA), (GPTBigCodeForCausalLM, SANTA)])
def test_a_layer_adds_nothing_in_a_launch_of_its_own(kind, config):
    """Residuals and their gradients: another layer is no further addition."""
    config._attn_implementation = roofline.attention_without_masks()
    with torch.device("meta"):
        supernet = SuperTransformer(kind(config).to(torch.bfloat16), DEEP, rank=4)
    launches = [roofline.train(supernet, Subnet(48, 3, 64, n), roofline.Workload(config, 2, 7)) for n in DEEP.layers]
    deep, shallow = (Counter(launch.name for launch in some) for some in launches)
    assert deep["product.forward"] > shallow["product.forward"]
    assert deep["torch.add"] == shallow["torch.add"]


def test_only_what_still_fits_is_read_from_the_cache():
    def launch(reads: dict[str, int], writes: dict[str, int]) -> Launch:
        return Launch("any", reads, writes)

    run = [launch({"x": 60}, {"h": 10}), launch({"x": 60, "w": 50}, {"y": 10}), launch({"y": 10, "x": 60}, {"z": 5})]
    assert memory_traffic(run, 0) == [launch.bytes for launch in run] == [70, 120, 75]
    assert memory_traffic(run, 70) == [70, 60, 65]  # x is near enough the first time, then w is between
    assert memory_traffic(run, 69) == [70, 120, 65]
    assert memory_traffic(run, 1000) == [70, 60, 5]


def test_pytorchs_kernels_are_counted_without_views_and_casts_that_do_nothing():
    x = torch.empty(6, 4, dtype=torch.bfloat16, device="meta")
    weight = torch.empty(5, 4, dtype=torch.bfloat16, device="meta")
    with record() as launches:
        y = torch.nn.functional.linear(x.view(2, 3, 4), weight).transpose(0, 1).to(torch.bfloat16)
        y.float() * torch.zeros_like(y[..., :1]).expand(3, 2, 5)
    found = [(x.name, sum(x.reads.values()), sum(x.writes.values()), x.flops) for x in launches]
    assert found == [("torch.mm", 48 + 40, 60, 2 * 6 * 4 * 5), ("torch._to_copy", 60, 120, 0),
                     ("torch.zeros_like", 0, 12, 0), ("torch.mul", 120 + 12, 120, 0)]  # fmt: skip


def test_lower_bound_equals_the_sum_by_hand():
    with torch.device("meta"):
        supernet = SuperTransformer(LlamaForCausalLM(LLAMA).to(torch.bfloat16), DEEP, rank=4)
    bound = LowerBound(supernet, Subnet(32, 2, 40, (0, 2)), 2, 7, rank=4)
    t, layers, n, q, kv, f, r = 14, 2, 32, 32, 16, 40, 4
    weights = 2 * (n * q + 2 * n * kv + q * n + 3 * n * f)
    adapters = 4 * r * ((n + q) + 2 * (n + kv) + (q + n) + 3 * (n + f))
    logsumexp, norm = 4 * t * 2, 2 * n

    # numbers of a token: norm; query, key and value; attention; out; norm; gate and up; down
    layer = (2 * n) + (n + q + 2 * kv) + (2 * q + 2 * kv) + (q + 2 * n) + (2 * n) + (n + 2 * f) + (2 * f + 2 * n)
    beside = 2 * n + 2 * n  # embedding and last norm
    forward = 2 * t * (beside + layers * layer) + layers * (weights + adapters + logsumexp + 2 * norm) + norm
    assert sum(launch.bytes for launch in bound.forward()) == forward

    # down; gate and up; norm; out; attention; query, key and value; norm
    layer = (n + 4 * f) + (2 * f + 2 * n) + (4 * n) + (n + 2 * q) + (4 * q + 4 * kv) + (q + 2 * kv + 2 * n) + (4 * n)
    less = n + 4 * n  # nothing before the first layer's query, key and value trains
    backward = 2 * t * (3 * n + layers * layer - less) + layers * (weights + 2 * adapters + logsumexp + 2 * norm)
    backward -= 2 * (n * q + 2 * n * kv)  # whose weights are not read, nor the norm's before them
    assert sum(launch.bytes for launch in bound.backward()) == backward

    products = 2 * t * layers * (weights // 2 + adapters // 4)
    attention = 4 * t * 7 * q // 2 * layers
    assert sum(launch.flops for launch in bound.forward()) == products + attention


def test_report_of_a_small_model():
    config = LlamaConfig(**(LLAMA.to_dict() | {"intermediate_size": 128}))
    rows = list(roofline.measure("small", roofline.Workload(config, 2, 7)))
    assert [(row["subnet"], row["pass"]) for row in rows][:2] == [("48/3/128/3", "training"), ("48/3/128/3", "1 token")]
    for row in rows:
        for what in ("bytes", "operations"):
            assert row["floor"][what] <= row["bound"][what] <= min(row["mlfs"][what], row["PEFT"][what])
        assert row["mlfs"]["launches"] < row["PEFT"]["launches"]
        assert row["mlfs"]["memory"] == sum(row["mlfs"]["memory by kernel"].values())
    assert "48/3/128/3" in roofline.show(rows)
