"""Fused attention blocks compute what the model's own do, with caches, masks, windows and hooks."""

import pytest
import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from mlfs.ops.backend import use_backend
from tests.models.fused.models import GPT, ROTARY, Calls, language_model, masked, suffix_of
from tests.supernets import distance, elastic, subnets_of
from tests.tiny_models import CASES, inputs


@pytest.mark.parametrize("name", ROTARY)
def test_attention_gets_what_the_model_gives_it(name, unfused, monkeypatch, reference):
    """Bit for bit: queries, keys, values, and all options (window, dropout while training, scaling)."""
    sdpa, seen = ALL_ATTENTION_FUNCTIONS["sdpa"], []

    def attend(module, *tensors, **options):
        seen.append((module.layer_idx, *tensors, sorted(options), *(options[key] for key in sorted(options))))
        return sdpa(module, *tensors, **options)

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "sdpa", attend)
    fused, plain = elastic(name, suffix_of(name)).train(), unfused(name, suffix_of(name)).train()
    for supernet in (fused, plain):
        supernet.config.attention_dropout = 0.25
        for layer in supernet.layers:
            layer.self_attn.attention_dropout = 0.25
        torch.manual_seed(5)
        supernet(**inputs("left"))
    half = len(seen) // 2
    assert half == fused.dimensions.layers
    for one, other in zip(seen[:half], seen[half:], strict=True):
        assert len(one) == len(other) and "dropout" in one[5]
        for a, b in zip(one, other, strict=True):
            assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("name", [*GPT, *ROTARY])
def test_attention_of_each_kind_has_the_models_bits(name, implementation, unfused, reference):
    """Also token by token, from the cache, and its weights, where there are any."""
    fused, plain = language_model(name), language_model(name, of=unfused)
    outcomes = []
    for supernet in (fused, plain):
        supernet.model.set_attn_implementation(implementation)
        with supernet.activate(subnets_of(name)["uniform"]), torch.no_grad():
            out = supernet(**inputs("left"), output_attentions=implementation == "eager")
            made = supernet.generate(**inputs("left"), max_new_tokens=6, output_logits=True,
                                     return_dict_in_generate=True)  # fmt: skip
        outcomes.append([out.logits, *(out.attentions or ()), made.sequences, *made.logits])
    assert len(outcomes[0]) == 2 + 6 + (3 if implementation == "eager" else 0)
    assert all(torch.equal(a, b) for a, b in zip(*outcomes, strict=True))


@pytest.mark.parametrize("name", ["llama", pytest.param("qwen3", marks=pytest.mark.soak), *GPT])
def test_decoders_on_the_kernels_take_caches_rows_and_checkpoints(name, unfused):
    """GPT's while dropout is on, which draws what torch draws."""
    pytest.importorskip("triton")
    fused, plain = language_model(name), language_model(name, of=unfused)
    subnets = list(subnets_of(name).values())[-3:]
    outcomes = []
    for supernet, backend in ((fused, "triton"), (plain, "reference")):
        with use_backend(backend):
            with supernet.activate(subnets[0]), torch.no_grad():
                made = supernet.generate(**inputs("left"), max_new_tokens=4, output_logits=True,
                                         return_dict_in_generate=True)  # fmt: skip
            supernet.model.gradient_checkpointing_enable({"use_reentrant": False})
            supernet.train()
            torch.manual_seed(5)
            with supernet.activate_rows(subnets):
                supernet(**inputs(), use_cache=False).logits.square().mean().backward()
        gradients = [p.grad for p in supernet.parameters() if p.grad is not None]
        outcomes.append([torch.stack(made.logits), *gradients])
    assert len(outcomes[0]) > 10
    for a, b in zip(*outcomes, strict=True):
        assert distance(a, b) < 1e-4


def test_a_bert_that_decodes_sees_nothing_ahead(compiled, monkeypatch):
    config = CASES["bert"].config
    decoding = {"is_decoder": True, "add_cross_attention": False}
    monkeypatch.setattr(type(CASES["bert"]), "config", property(lambda self: lambda: changed(config())), raising=False)

    def changed(made):
        for key, value in decoding.items():
            setattr(made, key, value)
        return made

    supernet = elastic("bert", "ForTokenClassification", dtype=torch.float64)
    with torch.inference_mode():
        for batch in (inputs(), masked("none")):
            found = supernet(**batch).logits
            with use_backend("reference"):
                assert distance(found, supernet(**batch).logits) < 1e-12


@pytest.mark.parametrize("name", [*GPT, *ROTARY])
def test_decoding_on_a_cpu_makes_the_models_tokens(name, compiled, unfused):
    """From a cache, past the window of those that have one, with padding and without."""
    fused, plain = (language_model(name, torch.float64, of) for of in (elastic, unfused))
    for batch in (inputs("left"), masked("none")):
        outcomes = []
        for supernet, backend in ((fused, "cpp"), (plain, "reference")):
            with use_backend(backend), supernet.activate(subnets_of(name)["uniform"]):
                made = supernet.generate(**batch, max_new_tokens=12, min_new_tokens=12, do_sample=False,
                                         output_logits=True, return_dict_in_generate=True)  # fmt: skip
            outcomes.append(made)
        assert torch.equal(outcomes[0].sequences, outcomes[1].sequences)
        assert distance(*(torch.stack(made.logits) for made in outcomes)) < 1e-5


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_projections_of_one_input_go_together_unless_one_is_watched(name):
    """On kernels. A hook on a projection sees its calls, and the others of that input are made beside it."""
    pytest.importorskip("triton")
    supernet, batch = elastic(name, suffix_of(name)), inputs()
    part, attention = ("query", "attention.self") if name == "bert" else ("q_proj", "self_attn")
    with use_backend("triton"), torch.no_grad():
        with Calls() as together:
            logits = supernet(**batch).logits
        seen: list[tuple[int, ...]] = []
        layer = supernet.layers[1].get_submodule(f"{attention}.{part}")
        with layer.register_forward_hook(lambda module, args, output: seen.append(output.shape)), Calls() as apart:
            again = supernet(**batch).logits
    assert distance(again, logits) < 1e-5
    assert seen == [(3, 11, 48)]
    assert together.seen["joint_linear"] - apart.seen["joint_linear"] == 1
    assert apart.seen["sliced_linear"] - together.seen["sliced_linear"] == 3


def test_attention_that_is_not_causal_stays_so(compiled, unfused):
    fused, plain = (f("llama", "ForCausalLM", dtype=torch.float64) for f in (elastic, unfused))
    for supernet in (fused, plain):
        for layer in supernet.layers:
            layer.self_attn.is_causal = False
    with torch.no_grad():
        found, expected = (supernet(inputs()["input_ids"], use_cache=False).logits for supernet in (fused, plain))
    assert distance(found, expected) < 1e-5
