"""Fused blocks compute what transformers' own forward passes do, and leave out the passes in between."""

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import mlfs.models.convert
import mlfs.models.fused.layer
from mlfs import SearchSpace, SuperTransformer
from mlfs.elastic.linear import ElasticLinear
from mlfs.models.fused.padding import reads_no_padding, without_padding
from mlfs.ops.backend import use_backend
from tests.supernets import distance, elastic, perturb, subnets_of
from tests.tiny_models import CASES, inputs, logits_of, make

GPT = ("gpt2", "gpt_bigcode-mqa", "gpt_bigcode-mha")
ROTARY = ("llama", "mistral", "qwen2", "qwen3")
WHOLLY = ("bert", "roberta", *GPT, *ROTARY)  # all of a layer but its attention
FUSED = (*WHOLLY, "gpt_neox")
# passes that PyTorch makes between the linear layers
PASSES = ("gelu", "silu", "native_layer_norm", "rsqrt", "neg")


class Calls(TorchDispatchMode):
    """Counts operators by name."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


@pytest.fixture
def unfused(monkeypatch):
    """A function that makes a super-transformer whose blocks all run as transformers wrote them."""

    def make_one(*args, **kwargs):
        with monkeypatch.context() as patch:
            patch.setattr(mlfs.models.convert, "fused_forward", lambda module, spec: None)
            return elastic(*args, **kwargs)

    return make_one


def suffix_of(name: str) -> str:
    classes = CASES[name].classes
    return "ForSequenceClassification" if "ForSequenceClassification" in classes else classes[0]


def language_model(name: str, dtype: torch.dtype = torch.float32, of=elastic):
    return of(name, "LMHeadModel" if name == "gpt2" else "ForCausalLM", dtype=dtype)


def run(supernet, subnet, **more) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Logits, and gradients of the last stage's adapters."""
    supernet.train_stage(2)
    with supernet.activate(subnet):
        logits = logits_of(supernet(**inputs(), **more))
        logits.float().square().sum().backward()
    gradients = {n: p.grad.clone() for n, p in supernet.named_parameters() if p.grad is not None}
    supernet.zero_grad()
    return logits.detach(), gradients


@pytest.mark.parametrize("name", FUSED)
def test_logits_and_gradients_are_those_of_the_models_own_blocks(name, unfused):
    mine = elastic(name, suffix_of(name), dtype=torch.float64)
    theirs = unfused(name, suffix_of(name), dtype=torch.float64)
    for subnet in subnets_of(name).values():
        (logits, gradients), (expected, others) = run(mine, subnet), run(theirs, subnet)
        assert distance(logits, expected) < 1e-12
        assert gradients.keys() == others.keys()
        assert len(gradients) > 10
        for key, gradient in gradients.items():
            assert distance(gradient, others[key]) < 1e-10, key


@pytest.mark.parametrize("name", ["bert", *GPT, "gpt_neox", "llama", "qwen3"])
def test_they_run_on_the_kernels_too(name, unfused):
    pytest.importorskip("triton")
    mine, theirs = elastic(name, suffix_of(name)), unfused(name, suffix_of(name))
    subnet = subnets_of(name)["per layer, without layer 0"]
    with use_backend("triton"):
        logits, gradients = run(mine, subnet)
    expected, others = run(theirs, subnet)
    assert distance(logits, expected) < 1e-5
    for key, gradient in gradients.items():
        assert distance(gradient, others[key]) < 1e-4, key


@pytest.mark.parametrize("name", WHOLLY)
def test_between_linear_layers_nothing_runs_but_attention(name, unfused):
    """On kernels, the activation, the residual, the norm and rotary embeddings make no pass of their own."""
    pytest.importorskip("triton")
    mine, theirs = elastic(name, suffix_of(name)), unfused(name, suffix_of(name))
    with use_backend("triton"), torch.no_grad():
        with Calls() as calls:
            mine(**inputs())
        with Calls() as others:
            theirs(**inputs())
    # the norms over head_dim are the model's own
    own = {"rsqrt": 2 * mine.dimensions.layers} if name == "qwen3" else {}
    assert {key: calls.seen[key] for key in PASSES if calls.seen[key]} == own
    sums = 4 if name in ("gpt2", *ROTARY) else 2  # with those of rotary embeddings, and of a GELU that is written out
    assert others.seen["add"] - calls.seen["add"] == sums * mine.dimensions.layers


@pytest.mark.parametrize(("name", "field", "value"), [("bert", "hidden_act", "relu"), ("llama", "hidden_act", "gelu")])
def test_an_activation_no_kernel_knows_runs_as_it_is(name, field, value, monkeypatch, unfused):
    config = CASES[name].config
    monkeypatch.setattr(type(CASES[name]), "config", property(lambda self: lambda: changed(config())), raising=False)

    def changed(made):
        setattr(made, field, value)
        return made

    subnet = subnets_of(name)["uniform"]
    mine, theirs = (f(name, suffix_of(name), dtype=torch.float64) for f in (elastic, unfused))
    assert getattr(mine.config, field) == value
    assert distance(run(mine, subnet)[0], run(theirs, subnet)[0]) < 1e-12


@pytest.mark.parametrize("name", ["bert", "llama", *GPT])
def test_under_autocast_types_and_numbers_stay(name, unfused):
    mine, theirs = elastic(name, suffix_of(name)), unfused(name, suffix_of(name))
    subnet, states = subnets_of(name)["uniform"], {"output_hidden_states": True}
    for backend in ("reference", "triton"):
        with use_backend(backend), torch.autocast("cpu", torch.bfloat16), torch.no_grad(), mine.activate(subnet):
            out = mine(**inputs(), **states)
        with use_backend(backend), torch.autocast("cpu", torch.bfloat16), torch.no_grad(), theirs.activate(subnet):
            expected = theirs(**inputs(), **states)
        for a, b in zip((out.logits, *out.hidden_states), (expected.logits, *expected.hidden_states), strict=True):
            assert a.dtype == b.dtype
            assert distance(a.float(), b.float()) < 0.05


@pytest.mark.parametrize("name", GPT)
def test_under_autocast_a_half_precision_stream_stays_so(name, unfused):
    """Norms take it in fp32, as autocast does on GPUs; what goes around them is not widened."""
    pytest.importorskip("triton")
    mine, theirs = (f(name, suffix_of(name), dtype=torch.bfloat16) for f in (elastic, unfused))
    states = []
    for supernet, backend in ((mine, "triton"), (theirs, "reference")):
        with use_backend(backend), torch.autocast("cpu", torch.bfloat16), torch.no_grad():
            states.append(supernet(**inputs(), output_hidden_states=True).hidden_states[:-1])
    for a, b in zip(*states, strict=True):
        assert a.dtype == b.dtype == torch.bfloat16
        assert distance(a.float(), b.float()) < 0.05


def test_dropout_of_a_block_is_the_models(unfused):
    """Without kernels it draws what torch draws; with them, other numbers of the same rate."""
    mine, theirs = elastic("bert", "ForSequenceClassification"), unfused("bert", "ForSequenceClassification")
    subnet = subnets_of("bert")["uniform"]
    outcomes = []
    for supernet in (mine, theirs):
        torch.manual_seed(3)
        with use_backend("reference"):
            outcomes.append(run(supernet.train(), subnet)[0])
    assert torch.equal(*outcomes)
    block = mine.layers[0].output
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


@pytest.mark.parametrize("name", ROTARY)
def test_attention_gets_what_the_model_gives_it(name, unfused, monkeypatch, reference):
    """Bit for bit: queries, keys, values, and all options (window, dropout while training, scaling)."""
    sdpa, seen = ALL_ATTENTION_FUNCTIONS["sdpa"], []

    def attend(module, *tensors, **options):
        seen.append((module.layer_idx, *tensors, sorted(options), *(options[key] for key in sorted(options))))
        return sdpa(module, *tensors, **options)

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "sdpa", attend)
    mine, theirs = elastic(name, suffix_of(name)).train(), unfused(name, suffix_of(name)).train()
    for supernet in (mine, theirs):
        supernet.config.attention_dropout = 0.25
        for layer in supernet.layers:
            layer.self_attn.attention_dropout = 0.25
        torch.manual_seed(5)
        supernet(**inputs("left"))
    half = len(seen) // 2
    assert half == mine.dimensions.layers
    for one, other in zip(seen[:half], seen[half:], strict=True):
        assert len(one) == len(other) and "dropout" in one[5]
        for a, b in zip(one, other, strict=True):
            assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("name", [*GPT, *ROTARY])
def test_attention_of_each_kind_has_the_models_bits(name, implementation, unfused, reference):
    """Also token by token, from the cache, and its weights, where there are any."""
    mine, theirs = language_model(name), language_model(name, of=unfused)
    outcomes = []
    for supernet in (mine, theirs):
        supernet.model.set_attn_implementation(implementation)
        with supernet.activate(subnets_of(name)["uniform"]), torch.no_grad():
            out = supernet(**inputs("left"), output_attentions=implementation == "eager")
            made = supernet.generate(**inputs("left"), max_new_tokens=6, output_logits=True,
                                     return_dict_in_generate=True)  # fmt: skip
        outcomes.append([out.logits, *(out.attentions or ()), made.sequences, *made.logits])
    assert len(outcomes[0]) == 2 + 6 + (3 if implementation == "eager" else 0)
    assert all(torch.equal(a, b) for a, b in zip(*outcomes, strict=True))


@pytest.mark.parametrize("name", ["llama", "qwen3", *GPT])
def test_decoders_on_the_kernels_take_caches_rows_and_checkpoints(name, unfused):
    """GPT's while dropout is on, which draws what torch draws."""
    pytest.importorskip("triton")
    mine, theirs = language_model(name), language_model(name, of=unfused)
    subnets = list(subnets_of(name).values())[-3:]
    outcomes = []
    for supernet, backend in ((mine, "triton"), (theirs, "reference")):
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


# ---- the extension for CPUs -----------------------------------------------------------------------------------------


@pytest.fixture
def compiled():
    """The backend for CPUs; its module."""
    module = pytest.importorskip("mlfs._cpu", reason="the C++ extension is not built")
    with use_backend("cpp"):
        yield module


def masked(kind: str) -> dict[str, torch.Tensor]:
    """Inputs with padding on one side, none, or with a gap, which no range of keys has."""
    batch = inputs("left" if kind == "left" else "right")
    if kind == "none":
        del batch["attention_mask"]
    if kind == "gap":
        batch["attention_mask"][0, 3:5] = 0
    return batch


@pytest.mark.parametrize("padding", ["right", "left", "none", "gap"])
@pytest.mark.parametrize("name", WHOLLY)
def test_layers_on_a_cpu_compute_what_the_models_own_do(name, padding, compiled, unfused):
    """Whole encoder layers in one call without gradients, part by part with them."""
    if encodes := name in ("bert", "roberta"):
        mine, theirs = (of(name, "ForTokenClassification", dtype=torch.float64) for of in (elastic, unfused))
    else:
        mine, theirs = (language_model(name, torch.float64, of) for of in (elastic, unfused))
    batch = masked(padding)
    kept = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
    for subnet in subnets_of(name).values():
        outcomes = []
        for supernet, backend in ((mine, "cpp"), (theirs, "reference")):
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
    mine, theirs = (language_model(name, torch.float64, of) for of in (elastic, unfused))
    for batch in (inputs("left"), masked("none")):
        outcomes = []
        for supernet, backend in ((mine, "cpp"), (theirs, "reference")):
            with use_backend(backend), supernet.activate(subnets_of(name)["uniform"]):
                made = supernet.generate(**batch, max_new_tokens=12, min_new_tokens=12, do_sample=False,
                                         output_logits=True, return_dict_in_generate=True)  # fmt: skip
            outcomes.append(made)
        assert torch.equal(outcomes[0].sequences, outcomes[1].sequences)
        assert distance(*(torch.stack(made.logits) for made in outcomes)) < 1e-5


@pytest.mark.parametrize("drops", [False, True])
@pytest.mark.parametrize("name", WHOLLY)
def test_gradients_that_meet_are_added_by_the_kernels(name, drops):
    """Those of query, key and value, of gate and up, and of both residual streams; and none goes through an activation
    in a pass of its own."""
    pytest.importorskip("triton")
    if drops and name in ROTARY:
        pytest.skip("these models drop nothing")
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
    mine, theirs = elastic(name, suffix_of(name)), unfused(name, suffix_of(name))
    subnet, outcomes = subnets_of(name)["per layer, without layer 0"], []
    for supernet, where in ((mine, backend), (theirs, "reference")):
        torch.manual_seed(3)
        with use_backend(where):
            outcomes.append(run(supernet.train(), subnet))
    (logits, gradients), (expected, others) = outcomes
    assert torch.equal(logits, expected) if backend == "reference" else distance(logits, expected) < 1e-5
    for key, gradient in gradients.items():
        assert distance(gradient, others[key]) < 1e-4, key


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("name", ["llama", *GPT])
def test_hooks_in_a_layer_see_what_they_see_in_the_models_own(name, backend, unfused):
    pytest.importorskip("triton")
    mine, theirs = language_model(name), language_model(name, of=unfused)
    parts = ("ln_1", "attn", "attn.c_attn", "attn.c_proj", "ln_2", "mlp", "mlp.c_fc") if name in GPT else (
        "input_layernorm", "self_attn", "self_attn.q_proj", "post_attention_layernorm", "mlp")  # fmt: skip
    seen: list[list[torch.Tensor]] = []
    for supernet, where in ((mine, backend), (theirs, "reference")):
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
    mine, theirs = (f(name, suffix_of(name)).layers[0] for f in (elastic, unfused))
    x, mask = torch.randn(2, 5, 48), torch.full((2, 1, 5, 5), -1e4).triu(1)
    calls = [((), {"attention_mask": mask}), ((None, None, mask), {}) if name != "gpt2" else ((None, mask, None), {})]
    for args, options in calls:
        found, expected = (layer(x, *args, **options) for layer in (mine, theirs))
        assert type(found) is type(expected) is torch.Tensor and torch.equal(found, expected)
        assert not torch.equal(found, mine(x, attention_mask=mask * 0))
    for layer in (mine, theirs):
        with pytest.raises(ValueError, match="add_cross_attention"):
            layer(x, encoder_hidden_states=x)


# ---- without padding ------------------------------------------------------------------------------------------------


@pytest.fixture
def tokens_seen(monkeypatch):
    """The shapes of what the first layer of a model gets; filled while it runs."""

    def watch(supernet) -> list[tuple[int, ...]]:
        seen: list[tuple[int, ...]] = []
        supernet.layers[0].register_forward_pre_hook(lambda module, args: seen.append(tuple(args[0].shape)))
        return seen

    return watch


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("suffix", ["ForSequenceClassification", "ForTokenClassification", "ForMaskedLM"])
@pytest.mark.parametrize("name", ["bert", "roberta"])
def test_encoders_skip_the_padding(name, suffix, implementation, compiled, tokens_seen, unfused):
    mine, theirs = (make_one(name, suffix, dtype=torch.float64) for make_one in (elastic, unfused))
    for supernet in (mine, theirs):
        supernet.model.set_attn_implementation(implementation)
    seen, batch = tokens_seen(mine), inputs()
    kept = batch["attention_mask"].bool()
    if suffix == "ForSequenceClassification":  # it reads the first token, which may be padding
        kept = kept[:, 0]
    for subnet in subnets_of(name).values():
        outcomes = []
        for supernet in (mine, theirs):
            supernet.train_stage(2)
            with supernet.activate(subnet), without_padding(supernet is mine):
                logits = supernet(**batch).logits[kept]
            logits.square().sum().backward()
            outcomes.append([logits.detach(), *(p.grad for p in supernet.parameters() if p.grad is not None)])
            supernet.zero_grad()
        assert len(outcomes[0]) == len(outcomes[1]) > 10
        for a, b in zip(*outcomes, strict=True):
            assert distance(a, b) < 1e-9
    assert {shape[:2] for shape in seen} == {(1, int(batch["attention_mask"].sum()))}


def test_padding_stays_where_it_has_to(compiled, tokens_seen):
    supernet = elastic("bert", "ForSequenceClassification", dtype=torch.float64)
    seen, batch = tokens_seen(supernet), inputs()
    with torch.no_grad():
        out = supernet(**batch, output_hidden_states=True)  # unless asked for, all is as in transformers
        with without_padding():
            with supernet.activate_rows([supernet.space.max] * 3):
                supernet(**batch)
            supernet(**inputs("left"))  # the classifier reads the first token, here padding
    assert {state.shape for state in out.hidden_states} == {(3, 11, 48)}
    assert set(seen) == {(3, 11, 48)}


def test_a_mask_that_weighs_keys_is_kept(compiled, unfused):
    """Numbers to be added that are neither 0 nor the lowest."""
    mine, theirs = (f("bert", "ForTokenClassification", dtype=torch.float64) for f in (elastic, unfused))
    ids, lowest = inputs()["input_ids"], torch.finfo(torch.float64).min
    for some in (-1.5, lowest):
        mask = torch.zeros(3, 1, 11, 11, dtype=torch.float64)
        mask[:, :, :, 2] = some
        with torch.no_grad():
            found, expected = (supernet(ids, attention_mask=mask).logits for supernet in (mine, theirs))
        kept = torch.arange(11) != 2
        assert distance(found[:, kept], expected[:, kept]) < 1e-9


def test_attention_that_is_not_causal_stays_so(compiled, unfused):
    mine, theirs = (f("llama", "ForCausalLM", dtype=torch.float64) for f in (elastic, unfused))
    for supernet in (mine, theirs):
        for layer in supernet.layers:
            layer.self_attn.is_causal = False
    with torch.no_grad():
        found, expected = (supernet(inputs()["input_ids"], use_cache=False).logits for supernet in (mine, theirs))
    assert distance(found, expected) < 1e-5


def test_a_mask_of_each_query_is_kept(compiled, tokens_seen):
    """One that is not the same for every query cannot be had by leaving tokens out."""
    supernet = elastic("bert", "ForTokenClassification", dtype=torch.float64)
    seen, ids = tokens_seen(supernet), inputs()["input_ids"]
    causal = torch.ones(11, 11).tril().bool().expand(3, 1, 11, 11)
    with torch.no_grad():
        logits, expected = (
            supernet(ids, attention_mask=causal).logits,
            supernet.model(ids, attention_mask=causal).logits,
        )
    assert torch.equal(logits, expected)
    assert set(seen) == {(3, 11, 48)}


def test_training_skips_the_padding_and_features_are_compared_token_by_token(compiled, tokens_seen, tmp_path):
    from mlfs import MLFSArguments, MLFSTrainer

    torch.manual_seed(0)
    supernet = elastic("bert", "ForSequenceClassification")
    rows = [{key: value[i] for key, value in inputs().items()} | {"labels": torch.tensor(i % 2)} for i in (0, 1, 2) * 4]
    args = MLFSArguments(
        output_dir=str(tmp_path), max_steps=3, per_device_train_batch_size=3, report_to=[], use_cpu=True,
        stages_to_train=[0, 1, 2], dropout_stages=[0, 1, 2], order="none", save_strategy="no", logging_steps=1,
    )  # fmt: skip
    trainer = MLFSTrainer(supernet, args, train_dataset=rows)
    seen = tokens_seen(supernet)
    trainer.train()
    assert {shape[0] for shape in seen} == {1}
    assert any("min_feature" in entry and 0 < entry["min_feature"] < 100 for entry in trainer.state.log_history)


@pytest.mark.parametrize("masked", [True, False])
def test_features_are_the_same_with_and_without_padding(masked, compiled):
    """Also of a subnet whose last state, which has its padding again, is compared with one that has not."""
    from mlfs.training.distillation import HiddenStateDistance

    space = SearchSpace((48, 24), (6, 2), (40, 16), ((0, 1, 2, 3), (0, 1)))
    supernet = perturb(SuperTransformer(make("bert", "ForSequenceClassification", dtype=torch.float64), space))
    distance = HiddenStateDistance(48, 4, [0.1]).double()
    batch = inputs() if masked else {"input_ids": inputs()["input_ids"]}
    losses = []
    for packs in (True, False):
        states = []
        for subnet in (space.min, space.max):
            with torch.no_grad(), supernet.activate(subnet), without_padding(packs):
                states.append(supernet(**batch, output_hidden_states=True))
        losses.append(distance(space.min, *states, batch.get("attention_mask")))
    assert losses[0] > 0
    torch.testing.assert_close(*losses, rtol=1e-9, atol=0)


def test_padding_that_a_loss_reads_is_kept():
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    labels = torch.tensor([[0, 1, -100], [1, 1, 0]])
    assert reads_no_padding({"labels": torch.tensor([0, 1]), "attention_mask": mask})
    assert reads_no_padding({"labels": labels, "attention_mask": mask})
    assert reads_no_padding({"labels": labels})
    assert not reads_no_padding({"labels": labels.abs(), "attention_mask": mask})
    assert not reads_no_padding({"start_positions": labels[:, 0], "attention_mask": mask})  # a softmax over all tokens
