"""What a super-transformer costs, how its subnets keep apart, and that it works as the model it was made from."""

import asyncio
import copy
import re
import statistics
import threading
import time
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor, nn
from torch.profiler import profile
from torch.utils._python_dispatch import TorchDispatchMode

from mlfs import MLFSError, SearchSpace, Subnet, SuperTransformer
from mlfs.elastic.linear import ElasticLinear
from tests.supernets import distance, elastic, parameters_of, perturb, space_of, subnets_of
from tests.tiny_models import all_models, inputs, logits_of, make

every_model = pytest.mark.parametrize(("name", "suffix"), all_models())
SOME = [
    ("bert", "ForSequenceClassification"),
    ("distilbert", "ForTokenClassification"),
    ("gpt2", "LMHeadModel"),
    ("gpt_bigcode-mqa", "ForCausalLM"),
    ("llama", "ForCausalLM"),
    ("qwen2", "ForSequenceClassification"),
]
some_models = pytest.mark.parametrize(("name", "suffix"), SOME)


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

    def work(mine: int) -> None:
        barrier.wait()
        for turn in range(25):
            with torch.no_grad(), supernet.activate(chosen[mine]):
                first = logits_of(supernet(**inputs()))
                with supernet.activate(chosen[mine - 1]):
                    second = logits_of(supernet(**inputs()))
                third = logits_of(supernet(**inputs()))
            right = (expected[mine], expected[mine - 1], expected[mine])
            if not all(map(torch.equal, (first, second, third), right)):
                wrong.append((mine, turn))

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


def train(supernet: SuperTransformer, subnets: list[Subnet]) -> dict[str, Tensor]:
    """Gradients of a step whose backward pass runs after every activation has ended."""
    supernet.train()
    for module in supernet.modules():
        for attribute, value in list(vars(module).items()):
            if isinstance(value, float) and ("dropout" in attribute or isinstance(module, nn.Dropout)):
                setattr(module, attribute, 0.0)
    loss = torch.zeros(())
    for subnet in subnets:
        with supernet.activate(subnet):
            loss = loss + logits_of(supernet(**inputs(), use_cache=False)).square().mean()
    with supernet.activate(supernet.space.min):  # of no concern to what already ran
        loss.backward()
    return {name: p.grad.clone() for name, p in supernet.own_parameters().items() if p.grad is not None}


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("thread", ["same thread", "another thread"])
@some_models
def test_gradient_checkpointing_gives_the_same_gradients(name, suffix, reentrant, thread):
    subnets = [subnets_of(name)[key] for key in ("max", "per layer, without layer 0", "per layer, full depth")]
    expected = train(elastic(name, suffix, torch.float64), subnets)
    supernet = elastic(name, suffix, torch.float64)
    # transformers before 5.21 has only the older name
    enable = getattr(supernet.model, "activation_checkpointing_enable", supernet.model.gradient_checkpointing_enable)
    enable({"use_reentrant": reentrant})
    if reentrant:
        supernet.model.enable_input_require_grads()
    ran: list[int] = []
    for block in supernet.layers:
        block.register_forward_pre_hook(lambda *_: ran.append(1))
    if thread == "same thread":
        actual = train(supernet, subnets)
    else:
        with ThreadPoolExecutor(1) as pool:
            actual = pool.submit(train, supernet, subnets).result()
    assert expected.keys() == actual.keys() and len(expected) > 20
    for place, gradient in expected.items():
        torch.testing.assert_close(actual[place], gradient, rtol=1e-9, atol=1e-12)
    small = supernet.extract(subnets[1])
    assert not any(getattr(module, "gradient_checkpointing", False) for module in small.modules())


@every_model
def test_hidden_states_are_those_of_the_extracted_model(name, suffix):
    supernet = elastic(name, suffix, torch.float64)
    for key in ("max", "uniform", "per layer, without layer 0"):
        subnet = subnets_of(name)[key]
        small = supernet.extract(subnet)
        with torch.no_grad(), supernet.activate(subnet):
            active = supernet(**inputs("left"), output_hidden_states=True).hidden_states
        with torch.no_grad():
            extracted = small(**inputs("left"), output_hidden_states=True).hidden_states
        assert len(active) == len(extracted) == len(subnet.layers) + 1
        assert all(h.shape[-1] == subnet.hidden for h in active)
        assert max(map(distance, active, extracted)) < 1e-12


@pytest.mark.parametrize(("name", "suffix"), [("llama", "ForCausalLM"), ("gpt2", "LMHeadModel")])
def test_compiled_without_graph_breaks_each_subnet_equals_eager(name, suffix):
    supernet = elastic(name, suffix)
    torch._dynamo.reset()
    compiled = torch.compile(supernet.model, fullgraph=True, backend="aot_eager")
    batch = inputs() | {"use_cache": False}
    for key in ("max", "per layer, without layer 0", "max"):
        with torch.no_grad(), supernet.activate(subnets_of(name)[key]):
            torch.testing.assert_close(compiled(**batch).logits, supernet(**batch).logits, rtol=1e-5, atol=1e-6)


def test_compiled_training_gives_the_gradients_of_eager():
    supernet = elastic("bert", "ForSequenceClassification")
    torch._dynamo.reset()
    compiled = torch.compile(supernet.model, fullgraph=True, backend="aot_eager")
    gradients = []
    for model in (supernet.model, compiled):
        supernet.zero_grad()
        with supernet.activate(subnets_of("bert")["per layer, full depth"]):
            model(**inputs()).logits.square().sum().backward()
        gradients.append({n: p.grad.clone() for n, p in supernet.own_parameters().items() if p.grad is not None})
    eager, traced = gradients
    assert eager.keys() == traced.keys() and eager
    for place in eager:
        torch.testing.assert_close(traced[place], eager[place], rtol=1e-4, atol=1e-6)


@some_models
def test_a_deep_copy_is_a_super_transformer_of_its_own(name, suffix):
    supernet = elastic(name, suffix)
    twin = copy.deepcopy(supernet)
    subnet = subnets_of(name)["per layer, without layer 0"]
    with torch.no_grad():
        with supernet.activate(subnet):
            expected = logits_of(supernet(**inputs()))
            assert twin.active == twin.space.max
            assert logits_of(twin(**inputs())).shape == expected.shape
            assert not torch.equal(logits_of(twin(**inputs())), expected)
        with twin.activate(subnet):
            assert torch.equal(logits_of(twin(**inputs())), expected)
        for parameter in supernet.parameters():
            parameter.zero_()
        with twin.activate(subnet):
            assert torch.equal(logits_of(twin(**inputs())), expected)
    assert torch.equal(logits_of(twin.extract(subnet)(**inputs())).isfinite(), torch.ones_like(expected, dtype=bool))


@some_models
def test_a_bf16_base_keeps_fp32_adapters(name, suffix):
    supernet = perturb(SuperTransformer(make(name, suffix, dtype=torch.bfloat16), space_of(name), rank=4))
    exact = perturb(SuperTransformer(make(name, suffix, dtype=torch.bfloat16).float(), space_of(name), rank=4))
    exact.load_state_dict(supernet.state_dict())
    kinds = {re.search(r"lora_[AB]", key) is not None: p.dtype for key, p in supernet.named_parameters()}
    assert kinds == {True: torch.float32, False: torch.bfloat16}
    for subnet in subnets_of(name).values():
        small = supernet.extract(subnet)
        assert {p.dtype for p in small.parameters()} == {torch.bfloat16}
        with torch.no_grad(), supernet.activate(subnet), exact.activate(subnet):
            active, right = logits_of(supernet(**inputs())), logits_of(exact(**inputs()))
        assert active.dtype == torch.bfloat16
        kept = inputs()["attention_mask"].bool() if active.dim() == 3 else ...
        assert (active.float() - right)[kept].norm() < 0.04 * right[kept].norm()
        with torch.no_grad():
            assert (logits_of(small(**inputs())).float() - right)[kept].norm() < 0.04 * right[kept].norm()
    logits_of(supernet(**inputs())).float().square().mean().backward()
    gradients = [p.grad for p in supernet.own_parameters().values() if p.grad is not None]
    assert gradients and all(torch.isfinite(g).all() for g in gradients)


def test_autocast_runs_every_subnet_in_bf16():
    supernet = elastic("llama", "ForCausalLM")
    for subnet in subnets_of("llama").values():
        with torch.no_grad(), supernet.activate(subnet):
            exact = supernet(**inputs()).logits
            with torch.autocast("cpu", dtype=torch.bfloat16):
                half = supernet(**inputs()).logits
        assert half.dtype == torch.bfloat16
        assert (half.float() - exact).norm() < 0.04 * exact.norm()


@every_model
def test_parameters_are_counted_as_the_extracted_model_has_them(name, suffix):
    supernet = elastic(name, suffix)
    for subnet in subnets_of(name).values():
        assert supernet.count_parameters(subnet) == parameters_of(supernet.extract(subnet))
    assert supernet.count_parameters(supernet.space.max) == parameters_of(make(name, suffix))


@every_model
def test_trainable_numbers_are_those_a_step_of_the_subnet_can_change(name, suffix):
    supernet = elastic(name, suffix)
    for stage, head, norms in ((0, True, False), (1, False, False), (2, True, True), (None, True, False)):
        supernet.train_stage(stage, head=head, norms=norms)
        trained = {key: p for key, p in supernet.model.named_parameters() if p.requires_grad}
        for subnet in (subnets_of(name)[key] for key in ("max", "min", "per layer, without layer 0")):
            # From the shapes of the extracted model, whose layers are numbered anew.
            expected = 0
            for key, parameter in supernet.extract(subnet).named_parameters():
                layer = re.escape(supernet.layers_name)
                place = re.sub(rf"^({layer}\.)(\d+)\.", lambda m, s=subnet: f"{m[1]}{s.layers[int(m[2])]}.", key)
                expected += parameter.numel() if place in trained else 0
                if place.endswith(".weight") and f"{place.removesuffix('weight')}lora_A.{stage}" in trained:
                    expected += 4 * sum(parameter.shape)
            assert supernet.count_trainable(subnet) == expected
            with supernet.activate(subnet):
                logits = logits_of(supernet(**inputs()))
            if logits.requires_grad:
                gradients = torch.autograd.grad(logits.square().sum(), trained.values(), allow_unused=True)
                assert 0 < sum(int((g != 0).sum()) for g in gradients if g is not None) <= expected


@every_model
def test_only_the_stage_that_trains_and_the_head_get_gradients(name, suffix):
    supernet = SuperTransformer(make(name, suffix), space_of(name), rank=4)
    heads = {
        f"{place}.{key}"
        for place, module in supernet.model.named_modules()
        if isinstance(module, ElasticLinear) and module.owned
        for key, _ in module.named_parameters(recurse=False)
    }
    assert bool(heads) == (suffix not in ("ForMaskedLM", "ForCausalLM", "LMHeadModel"))

    def training() -> set[str]:
        return {place for place, p in supernet.model.named_parameters() if p.requires_grad}

    adapters = [{p for p in supernet.own_parameters() if re.search(rf"lora_[AB]\.{s}$", p)} for s in range(3)]
    norms = {p for p, _ in supernet.model.named_parameters() if re.search(r"(norm|ln_[12f]|Norm)\.(weight|bias)$", p)}
    norms -= {p for p in norms if re.search(r"\.[qk]_norm\.", p)}  # over head_dim: no axis reaches them
    assert training() == adapters[0] | heads  # stage 0 from the start
    for stage in range(3):
        supernet.train_stage(stage)
        assert training() == adapters[stage] | heads and supernet.stage == stage
        supernet.train_stage(stage, head=False)
        assert training() == adapters[stage]
    supernet.train_stage(1, norms=True)
    assert training() == adapters[1] | heads | norms
    with supernet.activate(subnets_of(name)["per layer, without layer 0"]):
        logits_of(supernet(**inputs())).square().mean().backward()
    assert {place for place, p in supernet.model.named_parameters() if p.grad is not None} <= training()
    supernet.train_stage(1)
    assert training() == adapters[1] | heads
    supernet.train_stage(None, head=False)
    assert training() == set()


@every_model
def test_folded_stages_compute_the_same_to_rounding(name, suffix):
    supernet = elastic(name, suffix, torch.float64)
    for subnet in subnets_of(name).values():
        with torch.no_grad(), supernet.activate(subnet):
            expected = logits_of(supernet(**inputs()))
            for stages in (1, 2, 3):
                supernet.merge_stages(stages)
                assert distance(logits_of(supernet(**inputs())), expected) < 1e-12
                assert distance(logits_of(supernet.extract(subnet)(**inputs())), expected) < 1e-12
            supernet.merge_stages(0)
            assert torch.equal(logits_of(supernet(**inputs())), expected)


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
