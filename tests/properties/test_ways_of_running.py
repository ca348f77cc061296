"""Stages, checkpointed and compiled passes, bf16 and copies: each family gives what the plain pass gives."""

import copy
import re
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor, nn

from mlfs import Subnet, SuperTransformer
from mlfs.elastic.linear import ElasticLinear
from tests.supernets import distance, elastic, perturb, space_of, subnets_of
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
            # compiled, stages are multiplied apart; eager, the extension may add them to the weight
            torch.testing.assert_close(compiled(**batch).logits, supernet(**batch).logits, rtol=1e-5, atol=1e-5)


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
    dtypes = {re.search(r"lora_[AB]", key) is not None: p.dtype for key, p in supernet.named_parameters()}
    assert dtypes == {True: torch.float32, False: torch.bfloat16}
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
def test_merged_stages_compute_the_same_to_rounding(name, suffix):
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
