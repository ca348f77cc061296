"""What activating costs, how subnets keep apart, and what a super-transformer refuses."""

import asyncio
import statistics
import threading
import time
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor
from torch.profiler import profile
from torch.utils._python_dispatch import TorchDispatchMode

from mlfs import MLFSError, SearchSpace, Subnet, SuperTransformer
from tests.supernets import elastic, parameters_of, space_of, subnets_of
from tests.tiny_models import inputs, logits_of, make


class Ops(TorchDispatchMode):
    """Notes every operation on a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.fixture(scope="module")
def deep() -> SuperTransformer:
    """A Llama of 30 layers."""
    config = tf.LlamaConfig(
        vocab_size=61, hidden_size=32, num_attention_heads=4, num_key_value_heads=2, intermediate_size=48,
        num_hidden_layers=30,
    )  # fmt: skip
    space = SearchSpace((32, 24, 16), (4, 2), (48, 32, 16), (tuple(range(30)), tuple(range(0, 30, 2))), per_layer=True)
    return SuperTransformer(tf.LlamaForCausalLM(config), space, rank=2)


def test_activating_touches_no_tensor(deep):
    generator = torch.Generator().manual_seed(0)
    subnets = [deep.space.sample(generator) for _ in range(20)]
    with Ops() as ops:
        for subnet in subnets:
            with deep.activate(subnet), deep.activate(deep.space.min):
                pass
    assert ops.seen == []
    with Ops() as ops, torch.no_grad():
        deep(input_ids=torch.tensor([[1, 2]]))
    assert ops.seen  # that they would have been seen


def test_activating_again_keeps_no_memory(deep):
    subnet = deep.space.sample(torch.Generator().manual_seed(0))

    def activations(count: int) -> None:
        for _ in range(count):
            with deep.activate(subnet):
                pass

    activations(10)
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        activations(1000)
        after, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert after - before < 500 and peak - before < 5000  # bytes, of the loop itself


def test_activating_takes_less_than_a_millisecond_on_thirty_layers(deep):
    generator = torch.Generator().manual_seed(1)
    subnets = [deep.space.sample(generator) for _ in range(200)]
    first, again = [], []
    for times in (first, again):
        for subnet in subnets:
            start = time.perf_counter()
            with deep.activate(subnet):
                pass
            times.append(time.perf_counter() - start)
    assert statistics.median(first) < 1e-3
    assert statistics.median(again) < 1e-4


def test_peak_memory_of_converting_is_the_size_of_the_adapters():
    config = tf.LlamaConfig(
        vocab_size=500, hidden_size=512, num_attention_heads=8, num_key_value_heads=4, intermediate_size=2048,
        num_hidden_layers=4,
    )  # fmt: skip
    model = tf.LlamaForCausalLM(config)
    base = parameters_of(model) * 4
    with profile(profile_memory=True) as recorded:
        supernet = SuperTransformer(model, rank=8)
    adapters = sum(p.numel() * p.element_size() for p in supernet.own_parameters().values())
    live = peak = 0
    for event in recorded.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    assert base > 40e6 and adapters < base / 10
    assert adapters <= peak < 1.01 * adapters


def test_activations_nest_and_restore_the_outer_one_also_after_an_exception():
    supernet = elastic("bert", "ForSequenceClassification")
    outer, inner = subnets_of("bert")["uniform"], subnets_of("bert")["per layer, without layer 0"]

    def logits() -> Tensor:
        with torch.no_grad():
            return supernet(**inputs()).logits

    expected = {}
    for subnet in (supernet.space.max, outer, inner):
        with supernet.activate(subnet) as activated:
            assert activated is supernet and supernet.active == subnet
            expected[subnet] = logits()
    assert len({tuple(value.flatten().tolist()) for value in expected.values()}) == 3
    with supernet.activate(outer):
        with pytest.raises(KeyError), supernet.activate(inner):
            assert torch.equal(logits(), expected[inner])
            raise KeyError
        assert supernet.active == outer and torch.equal(logits(), expected[outer])
        with supernet.activate(inner), supernet.activate(outer), supernet.activate(inner):
            assert torch.equal(logits(), expected[inner])
        assert torch.equal(logits(), expected[outer])
        with pytest.raises(MLFSError), supernet.activate(Subnet(47, 6, 40, (0, 1, 2, 3))):
            raise AssertionError("entered a subnet that there is not")
        assert torch.equal(logits(), expected[outer])
    assert supernet.active == supernet.space.max
    assert torch.equal(logits(), expected[supernet.space.max])


def test_a_generator_that_is_left_half_way_restores_the_outer_subnet():
    supernet = elastic("bert", "ForSequenceClassification")

    def steps():
        with supernet.activate(supernet.space.min):
            yield
            yield

    running = steps()
    next(running)
    running.close()
    assert supernet.active == supernet.space.max


@pytest.mark.parametrize(("name", "suffix"), [("bert", "ForMaskedLM"), ("llama", "ForCausalLM")])
def test_threads_that_run_different_subnets_each_get_their_own_result(name, suffix):
    supernet = elastic(name, suffix)
    chosen = list(subnets_of(name).values())[:4]
    expected = []
    for subnet in chosen:
        with torch.no_grad(), supernet.activate(subnet):
            expected.append(logits_of(supernet(**inputs())))
    barrier, wrong = threading.Barrier(len(chosen)), []

    def work(own: int) -> None:
        barrier.wait()
        for turn in range(25):
            with torch.no_grad(), supernet.activate(chosen[own]):
                first = logits_of(supernet(**inputs()))
                with supernet.activate(chosen[own - 1]):
                    second = logits_of(supernet(**inputs()))
                third = logits_of(supernet(**inputs()))
            right = (expected[own], expected[own - 1], expected[own])
            if not all(map(torch.equal, (first, second, third), right)):
                wrong.append((own, turn))

    with ThreadPoolExecutor(len(chosen)) as pool:
        for done in [pool.submit(work, i) for i in range(len(chosen))]:
            done.result()
    assert wrong == []


def test_a_new_thread_starts_with_the_whole_model():
    supernet = elastic("bert", "ForSequenceClassification")
    seen = []
    with supernet.activate(supernet.space.min):
        thread = threading.Thread(target=lambda: seen.append(supernet.active))
        thread.start()
        thread.join()
    assert seen == [supernet.space.max]


def test_tasks_of_one_thread_keep_apart():
    supernet = elastic("bert", "ForSequenceClassification")

    async def run(subnet: Subnet) -> bool:
        with supernet.activate(subnet):
            for _ in range(5):
                await asyncio.sleep(0)
                if supernet.active != subnet:
                    return False
        return True

    async def both() -> list[bool]:
        return await asyncio.gather(run(supernet.space.min), run(supernet.space.max))

    assert asyncio.run(both()) == [True, True]


def test_two_super_transformers_do_not_share_what_is_active():
    one, other = (elastic("bert", "ForSequenceClassification") for _ in range(2))
    with one.activate(one.space.min):
        assert other.active == other.space.max


def test_what_is_not_found_here_is_the_models():
    supernet = elastic("llama", "ForCausalLM")
    assert supernet.config is supernet.model.config
    assert supernet.generation_config is supernet.model.generation_config
    assert supernet.dtype == torch.float32
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = supernet.nonsense


def test_remembered_subnets_are_bounded(deep):
    generator = torch.Generator().manual_seed(2)
    for _ in range(10_500):
        deep.layer_sizes(deep.space.sample(generator))
    assert len(deep._layer_sizes) <= 10_000


@pytest.mark.parametrize("use", ["activate", "extract", "count_parameters", "count_trainable"])
@pytest.mark.parametrize(
    ("subnet", "message"),
    [
        (Subnet(47, 6, 40, (0, 1, 2, 3)), "hidden=47 is not one of"),
        (Subnet(48, 3, 40, (0, 1, 2, 3)), "heads=3 is not one of"),
        (Subnet(48, 6, 40, (0, 1)), r"layers=\(0, 1\) is not one of"),
        ("max", "expected a Subnet, got str: 'max'"),
    ],
)
def test_subnet_outside_the_space_is_refused_everywhere(use, subnet, message):
    supernet = SuperTransformer(make("llama", "ForCausalLM"), space_of("llama"), rank=2)
    with pytest.raises(MLFSError, match=message):
        result = getattr(supernet, use)(subnet)
        if use == "activate":
            result.__enter__()


def test_stage_that_there_is_not_is_refused():
    supernet = SuperTransformer(make("llama", "ForCausalLM"), space_of("llama"), rank=2)
    with pytest.raises(MLFSError, match="stage=3: this super-transformer has stages 0 to 2"):
        supernet.train_stage(3)


def test_family_that_is_not_in_the_table_is_refused_by_name():
    config = tf.T5Config(vocab_size=61, d_model=16, d_kv=4, d_ff=32, num_layers=1, num_heads=4)
    with pytest.raises(
        MLFSError, match=r"model family 't5' is not in the table: expected one of bert, .*'Add a family'"
    ):
        SuperTransformer(tf.T5ForConditionalGeneration(config))


def test_unsupported_variant_is_refused_with_the_reason():
    config = tf.GPT2Config(vocab_size=61, n_embd=16, n_head=2, n_layer=1, scale_attn_by_inverse_layer_idx=True)
    with pytest.raises(MLFSError, match="scale_attn_by_inverse_layer_idx=True cannot be made elastic: its attention"):
        SuperTransformer(tf.GPT2LMHeadModel(config))


def test_rank_larger_than_a_layer_is_refused_by_the_layers_name_and_nothing_is_replaced():
    model = make("llama", "ForCausalLM")
    with pytest.raises(MLFSError, match=r"model\.layers\.0\.self_attn\.k_proj: rank=32, .* choose a lower rank"):
        SuperTransformer(model, space_of("llama"), rank=32)
    assert not any(type(module).__module__.startswith("mlfs") for module in model.modules())
    assert all(p.requires_grad for p in model.parameters())


def test_model_that_is_elastic_already_is_refused():
    supernet = elastic("bert", "ForSequenceClassification")
    with pytest.raises(MLFSError, match="this model is elastic already"):
        SuperTransformer(supernet.model, space_of("bert"))


def test_head_that_is_not_in_the_table_is_refused_by_name():
    model = tf.BertForPreTraining(tf.BertConfig(
        vocab_size=61, hidden_size=16, num_attention_heads=2, intermediate_size=16, num_hidden_layers=1
    ))  # fmt: skip
    with pytest.raises(
        MLFSError, match=r"module 'cls\.seq_relationship' \(Linear\) is not in the table of family 'bert'"
    ):
        SuperTransformer(model)
    assert not any(type(module).__module__.startswith("mlfs") for module in model.modules())
