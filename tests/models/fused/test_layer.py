"""Fused blocks of a layer compute what transformers' own forward passes do, and leave out the passes in between."""

import pytest
import torch

import mlfs.models.fused.layer
from mlfs.elastic.linear import ElasticLinear
from mlfs.ops.backend import use_backend
from tests.models.fused.models import FUSED, GPT, ROTARY, WHOLLY, Calls, language_model, masked, run, suffix_of
from tests.supernets import distance, elastic, subnets_of
from tests.tiny_models import inputs, make

# passes that PyTorch makes between the linear layers
PASSES = ("gelu", "silu", "native_layer_norm", "rsqrt", "neg")


@pytest.mark.parametrize("name", FUSED)
def test_logits_and_gradients_are_those_of_the_models_own_blocks(name, unfused):
    fused = elastic(name, suffix_of(name), dtype=torch.float64)
    plain = unfused(name, suffix_of(name), dtype=torch.float64)
    for subnet in subnets_of(name).values():
        (logits, gradients), (expected, others) = run(fused, subnet), run(plain, subnet)
        assert distance(logits, expected) < 1e-12
        assert gradients.keys() == others.keys()
        assert len(gradients) > 10
        for key, gradient in gradients.items():
            assert distance(gradient, others[key]) < 1e-10, key


@pytest.mark.parametrize("name", ["bert", *GPT, "gpt_neox", "llama", "qwen3"])
def test_they_run_on_the_kernels_too(name, unfused):
    pytest.importorskip("triton")
    fused, plain = elastic(name, suffix_of(name)), unfused(name, suffix_of(name))
    subnet = subnets_of(name)["per layer, without layer 0"]
    with use_backend("triton"):
        logits, gradients = run(fused, subnet)
    expected, others = run(plain, subnet)
    assert distance(logits, expected) < 1e-5
    for key, gradient in gradients.items():
        assert distance(gradient, others[key]) < 1e-4, key


@pytest.mark.parametrize("name", WHOLLY)
def test_between_linear_layers_nothing_runs_but_attention(name, unfused):
    """On kernels, the activation, the residual, the norm and rotary embeddings make no pass of their own."""
    pytest.importorskip("triton")
    fused, plain = elastic(name, suffix_of(name)), unfused(name, suffix_of(name))
    with use_backend("triton"), torch.no_grad():
        with Calls() as calls:
            fused(**inputs())
        with Calls() as others:
            plain(**inputs())
    # the norms over head_dim are the model's own
    own = {"rsqrt": 2 * fused.dimensions.layers} if name == "qwen3" else {}
    assert {key: calls.seen[key] for key in PASSES if calls.seen[key]} == own
    sums = 4 if name in ("gpt2", *ROTARY) else 2  # with those of rotary embeddings, and of a GELU that is written out
    assert others.seen["add"] - calls.seen["add"] == sums * fused.dimensions.layers


@pytest.mark.parametrize("name", ["bert", "llama", *GPT])
def test_under_autocast_types_and_numbers_stay(name, unfused):
    fused, plain = elastic(name, suffix_of(name)), unfused(name, suffix_of(name))
    subnet, states = subnets_of(name)["uniform"], {"output_hidden_states": True}
    for backend in ("reference", "triton"):
        with use_backend(backend), torch.autocast("cpu", torch.bfloat16), torch.no_grad(), fused.activate(subnet):
            out = fused(**inputs(), **states)
        with use_backend(backend), torch.autocast("cpu", torch.bfloat16), torch.no_grad(), plain.activate(subnet):
            expected = plain(**inputs(), **states)
        for a, b in zip((out.logits, *out.hidden_states), (expected.logits, *expected.hidden_states), strict=True):
            assert a.dtype == b.dtype
            assert distance(a.float(), b.float()) < 0.05


@pytest.mark.parametrize("name", GPT)
def test_under_autocast_a_half_precision_stream_stays_so(name, unfused):
    """Norms take it in fp32, as autocast does on GPUs; what goes around them is not widened."""
    pytest.importorskip("triton")
    fused, plain = (f(name, suffix_of(name), dtype=torch.bfloat16) for f in (elastic, unfused))
    states = []
    for supernet, backend in ((fused, "triton"), (plain, "reference")):
        with use_backend(backend), torch.autocast("cpu", torch.bfloat16), torch.no_grad():
            states.append(supernet(**inputs(), output_hidden_states=True).hidden_states[:-1])
    for a, b in zip(*states, strict=True):
        assert a.dtype == b.dtype == torch.bfloat16
        assert distance(a.float(), b.float()) < 0.05


def test_dropout_of_a_block_is_the_models(unfused):
    """Without kernels it draws what torch draws; with them, other numbers of the same rate."""
    fused, plain = elastic("bert", "ForSequenceClassification"), unfused("bert", "ForSequenceClassification")
    subnet = subnets_of("bert")["uniform"]
    outcomes = []
    for supernet in (fused, plain):
        torch.manual_seed(3)
        with use_backend("reference"):
            outcomes.append(run(supernet.train(), subnet)[0])
    assert torch.equal(*outcomes)
    block = fused.layers[0].output
    block.dropout.p = 0.25
    ones = torch.ones(200, 40)
    with use_backend("triton"), torch.no_grad():
        linear = ElasticLinear.from_linear(torch.nn.Linear(40, 48, bias=False), rank=0)
        linear.weight.fill_(1 / 40)
        block.dense, norm = linear, block.LayerNorm
        norm.weight.fill_(1.0), norm.bias.zero_()
        # of numbers that are 1 / 0.75 or 0 the smaller ones were dropped
        dropped = (block(ones, torch.zeros(200, 48)) < 0).float().mean()
        again = (block(ones, torch.zeros(200, 48)) < 0).float().mean()
    assert dropped.item() == pytest.approx(0.25, abs=0.02)
    assert dropped != again


@pytest.mark.parametrize("padding", ["right", "left", "none", "gap"])
@pytest.mark.parametrize("name", WHOLLY)
def test_layers_on_a_cpu_compute_what_the_models_own_do(name, padding, compiled, unfused):
    """Whole encoder layers in one call without gradients, part by part with them."""
    if encodes := name in ("bert", "roberta"):
        fused, plain = (of(name, "ForTokenClassification", dtype=torch.float64) for of in (elastic, unfused))
    else:
        fused, plain = (language_model(name, torch.float64, of) for of in (elastic, unfused))
    batch = masked(padding)
    kept = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
    for subnet in subnets_of(name).values():
        outcomes = []
        for supernet, backend in ((fused, "cpp"), (plain, "reference")):
            supernet.train_stage(2)
            with use_backend(backend), supernet.activate(subnet):
                with torch.no_grad():
                    direct = supernet(**batch, output_hidden_states=True)
                logits = supernet(**batch).logits[kept]
                logits.square().sum().backward()
            outcomes.append([torch.stack(direct.hidden_states)[:, kept], direct.logits[kept], logits.detach(),
                             *(p.grad for p in supernet.parameters() if p.grad is not None)])  # fmt: skip
            supernet.zero_grad()
        assert len(outcomes[0]) == len(outcomes[1]) > 10
        for a, b in zip(*outcomes, strict=True):
            assert distance(a, b) < (1e-9 if encodes or name in GPT else 1e-5)  # RMSNorms take fp32


@pytest.mark.parametrize("name", ["bert", "roberta"])
def test_a_layer_is_one_call_unless_something_looks_inside(name, compiled, monkeypatch):
    supernet, calls = elastic(name, "ForTokenClassification", dtype=torch.float64), []
    whole = mlfs.models.fused.layer.encoder_layer
    monkeypatch.setattr(mlfs.models.fused.layer, "encoder_layer", lambda *args: calls.append(1) or whole(*args))
    layers = supernet.dimensions.layers
    with torch.inference_mode():
        expected = supernet(**inputs()).logits
        assert len(calls) == layers
        seen = []
        hook = supernet.layers[1].output.dense.register_forward_hook(lambda *_: seen.append(1))
        assert distance(supernet(**inputs()).logits, expected) < 1e-12
        assert (len(calls), len(seen)) == (2 * layers - 1, 1)
        hook.remove()
        supernet.model.set_attn_implementation("eager")
        weights = supernet(**inputs(), output_attentions=True).attentions
        assert len(weights) == layers and all(w is not None for w in weights)
        assert len(calls) == 2 * layers - 1
    supernet.model.set_attn_implementation("sdpa")
    supernet.train()(**inputs())  # there is dropout between the parts
    assert len(calls) == 2 * layers - 1


@pytest.mark.parametrize("name, drops", [*((name, False) for name in WHOLLY), ("bert", True), ("gpt2", True)])
def test_gradients_that_meet_are_added_by_the_kernels(name, drops):
    """Those of query, key and value, of gate and up, and of both residual streams; and none goes through an activation
    in a pass of its own."""
    pytest.importorskip("triton")
    supernet = elastic(name, suffix_of(name)) if name in ("bert", "roberta") else language_model(name)
    for module in supernet.layers.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.1 if drops else 0.0
    with use_backend("triton"):
        out = supernet.base_model(**inputs(), **({"use_cache": False} if name in ROTARY else {})).last_hidden_state
        with Calls() as calls:
            out.square().mean().backward()
    layers = supernet.dimensions.layers
    own = 2 * layers if name == "qwen3" else 0  # the norms over head_dim are the model's own
    rotary = layers if name in ROTARY else 0
    expected = {"joint_linear_backward": 0 if name in GPT else layers, "feed_forward_backward": layers, "add_": 0}
    expected |= {"sliced_linear_backward": 2 * layers if name in GPT else layers, "rotary": rotary, "add": own}
    assert {key: calls.seen[key] for key in expected} == expected


@pytest.mark.parametrize("name", ["llama", *GPT])
def test_an_extracted_model_has_the_models_own_blocks(name):
    supernet = language_model(name)
    small = supernet.extract(subnets_of(name)["uniform"])
    plain = make(name, suffix_of(name))
    for part in small.base_model.modules():
        assert type(part).forward in {type(m).forward for m in plain.modules()}


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("name", GPT)
def test_dropout_of_gpts_layers_draws_what_torch_draws(name, backend, unfused):
    pytest.importorskip("triton")
    fused, plain = elastic(name, suffix_of(name)), unfused(name, suffix_of(name))
    subnet, outcomes = subnets_of(name)["per layer, without layer 0"], []
    for supernet, where in ((fused, backend), (plain, "reference")):
        torch.manual_seed(3)
        with use_backend(where):
            outcomes.append(run(supernet.train(), subnet))
    (logits, gradients), (expected, others) = outcomes
    assert torch.equal(logits, expected) if backend == "reference" else distance(logits, expected) < 1e-5
    for key, gradient in gradients.items():
        assert distance(gradient, others[key]) < 1e-4, key


@pytest.mark.parametrize("name, backend", [("llama", "triton"), *((name, "reference") for name in ("llama", *GPT))])
def test_hooks_in_a_layer_see_what_they_see_in_the_models_own(name, backend, unfused):
    pytest.importorskip("triton")
    fused, plain = language_model(name), language_model(name, of=unfused)
    parts = ("ln_1", "attn", "attn.c_attn", "attn.c_proj", "ln_2", "mlp", "mlp.c_fc") if name in GPT else (
        "input_layernorm", "self_attn", "self_attn.q_proj", "post_attention_layernorm", "mlp")  # fmt: skip
    seen: list[list[torch.Tensor]] = []
    for supernet, where in ((fused, backend), (plain, "reference")):
        for part in parts:
            calls: list[torch.Tensor] = []

            def see(module, args, kwargs, calls=calls):
                calls.append((*args, *kwargs.values())[0])

            hook = supernet.layers[1].get_submodule(part).register_forward_pre_hook(see, with_kwargs=True)
            with use_backend(where), torch.no_grad():
                supernet(**inputs())
            hook.remove()
            seen.append(calls)
    for a, b in zip(seen[: len(parts)], seen[len(parts) :], strict=True):
        assert len(a) == len(b) == 1 and distance(a[0], b[0]) < 1e-5


@pytest.mark.parametrize("name", GPT)
def test_a_layer_is_called_as_the_models_own(name, unfused, reference):
    """By position or by name, and with what only transformers' own can answer, or refuse."""
    fused, plain = (f(name, suffix_of(name)).layers[0] for f in (elastic, unfused))
    x, mask = torch.randn(2, 5, 48), torch.full((2, 1, 5, 5), -1e4).triu(1)
    calls = [((), {"attention_mask": mask}), ((None, None, mask), {}) if name != "gpt2" else ((None, mask, None), {})]
    for args, options in calls:
        found, expected = (layer(x, *args, **options) for layer in (fused, plain))
        assert type(found) is type(expected) is torch.Tensor and torch.equal(found, expected)
        assert not torch.equal(found, fused(x, attention_mask=mask * 0))
    for layer in (fused, plain):
        with pytest.raises(ValueError, match="add_cross_attention"):
            layer(x, encoder_hidden_states=x)
