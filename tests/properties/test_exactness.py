"""Every family and head: the whole model is the original, a subnet is the model that `extract` takes out of it.

Also what neither of the two could get wrong alike: a subnet is compared with weights sliced and merged by hand here,
and with the original model in which the heads and units the subnet lacks are silenced.
"""

import copy
import pickle
import re

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import PreTrainedModel

from mlfs import Subnet, SuperTransformer
from mlfs.elastic.base import Elastic
from mlfs.elastic.linear import ElasticLinear
from mlfs.models.families.spec import Linear
from mlfs.models.follow import FollowsSubnet
from tests.supernets import HIDDEN, distance, elastic, space_of, subnets_of
from tests.tiny_models import CASES, PAD, all_models, inputs, logits_of, make

MODELS = all_models()
DECODERS = [(name, suffix) for name, suffix in MODELS if suffix in ("ForCausalLM", "LMHeadModel")]
every_model = pytest.mark.parametrize(("name", "suffix"), MODELS)
every_decoder = pytest.mark.parametrize(("name", "suffix"), DECODERS)


@every_model
def test_every_base_parameter_keeps_its_storage(name, suffix):
    model = make(name, suffix)
    before = {key: (p.data_ptr(), p.shape, p.stride()) for key, p in model.named_parameters(remove_duplicate=False)}
    SuperTransformer(model, space_of(name))
    after = dict(model.named_parameters(remove_duplicate=False))
    assert {key: (after[key].data_ptr(), after[key].shape, after[key].stride()) for key in before} == before
    assert all(re.search(r"\.lora_[AB]\.\d+$", key) for key in after.keys() - before.keys())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=["fp32", "fp64", "bf16"])
@every_model
@pytest.mark.usefixtures("reference")
def test_maxnet_with_fresh_adapters_is_the_original_bit_for_bit(name, suffix, dtype):
    model = make(name, suffix, dtype=dtype)
    with torch.no_grad():
        before = [logits_of(model(**inputs(side))) for side in ("left", "right")]
        supernet = SuperTransformer(model, space_of(name))
        for side, expected in zip(("left", "right"), before, strict=True):
            assert torch.equal(logits_of(supernet(**inputs(side))), expected)
            with supernet.activate(supernet.space.max):
                assert torch.equal(logits_of(supernet(**inputs(side))), expected)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)], ids=["fp32", "fp64"])
@every_model
def test_extracted_model_gives_the_active_subnets_logits(name, suffix, dtype, tolerance):
    supernet = elastic(name, suffix, dtype)
    for subnet in subnets_of(name).values():
        small = supernet.extract(subnet)
        assert type(small) is type(make(name, suffix))
        for side in ("left", "right"):
            with torch.no_grad(), supernet.activate(subnet):
                active = logits_of(supernet(**inputs(side)))
            with torch.no_grad():
                extracted = logits_of(small(**inputs(side)))
            assert distance(active, extracted) < tolerance, (subnet, side)


@every_decoder
def test_greedy_tokens_with_cache_equal_those_of_the_extracted_model(name, suffix):
    supernet = elastic(name, suffix)
    greedy = dict(max_new_tokens=9, do_sample=False, pad_token_id=PAD)
    chosen = ("max", "min", "uniform", "per layer, without layer 0", "per layer, random")
    for subnet in (subnets_of(name)[key] for key in chosen):
        small = supernet.extract(subnet)
        for batch in (inputs("left"), {"input_ids": inputs()["input_ids"][:1, :5]}):
            with supernet.activate(subnet):
                cached = supernet.generate(**batch, **greedy)
                again = supernet.generate(**batch, **greedy, use_cache=False)
            assert cached.shape[1] == batch["input_ids"].shape[1] + 9
            assert torch.equal(cached, small.generate(**batch, **greedy)), subnet
            assert torch.equal(cached, again), subnet


@every_decoder
def test_logits_from_a_cache_equal_those_of_one_pass(name, suffix):
    """Closer than tokens: the cache of a subnet without layer 0 counts, masks and places every token."""
    supernet, batch = elastic(name, suffix, torch.float64), inputs("left")
    for key in ("max", "per layer, without layer 0"):
        with torch.no_grad(), supernet.activate(subnets_of(name)[key]):
            positions = (batch["attention_mask"].cumsum(-1) - 1).clamp_min(0)
            whole = supernet(**batch, position_ids=positions).logits
            cache, parts = None, []
            for start, stop in ((0, 6), (6, 7), (7, 11)):
                step = supernet(
                    input_ids=batch["input_ids"][:, start:stop],
                    attention_mask=batch["attention_mask"][:, :stop],
                    position_ids=positions[:, start:stop],
                    past_key_values=cache,
                    use_cache=True,
                )
                cache = step.past_key_values
                parts.append(step.logits)
            kept = batch["attention_mask"].bool()
            assert distance(torch.cat(parts, 1)[kept], whole[kept]) < 1e-12


def sliced_and_merged(supernet: SuperTransformer, small: PreTrainedModel, subnet: Subnet) -> dict[str, Tensor]:
    """The small model's parameters as differentiable functions of the big one's, sliced by hand."""
    out = {}
    for name, parameter in small.named_parameters():
        place = re.sub(
            rf"^({re.escape(supernet.layers_name)}\.)(\d+)\.", lambda m: f"{m[1]}{subnet.layers[int(m[2])]}.", name
        )
        owner, _, leaf = place.rpartition(".")
        module = supernet.model.get_submodule(owner)
        full = getattr(module, leaf)
        if not isinstance(module, ElasticLinear):
            out[name] = full[tuple(slice(size) for size in parameter.shape)]
            continue
        conv = module.transposed and leaf == "weight"
        shape = parameter.shape[::-1] if conv else parameter.shape
        rows = rows_by_hand(supernet, owner, shape[0])
        if leaf == "bias":
            out[name] = full[rows]
            continue
        weight = (full.T if conv else full)[rows][:, : shape[1]]
        for a, b, c in zip(module.lora_A, module.lora_B, module.scales, strict=True):
            weight = weight + c * b[rows] @ a[:, : shape[1]]
        out[name] = weight.T if conv else weight
    return out


def rows_by_hand(supernet: SuperTransformer, module: str, rows: int) -> list[int]:
    """Which rows of a projection a subnet with `rows` of them has: the leading ones of each fused part."""
    kind = supernet.config.model_type
    if not module.endswith("c_attn") or (kind == "gpt_bigcode" and not supernet.config.multi_query):
        return list(range(rows))
    if kind == "gpt_bigcode":
        return [*range(rows - 16), *range(48, 64)]  # queries, then the one key and value
    third = rows // 3
    return [part + i for part in (0, 48, 96) for i in range(third)]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.float64, 1e-9)], ids=["fp32", "fp64"])
@every_model
def test_gradients_equal_autograds_through_a_model_sliced_and_merged_by_hand(name, suffix, dtype, tolerance):
    supernet = elastic(name, suffix, dtype)
    trained = {key: p.requires_grad_() for key, p in supernet.own_parameters().items()}
    assert any("lora_A.2" in key for key in trained)
    for key in ("max", "min", "per layer, full depth", "per layer, without layer 0"):
        subnet = subnets_of(name)[key]
        small = supernet.extract(subnet)
        with supernet.activate(subnet):
            logits = logits_of(supernet(**inputs("left")))
        by_hand = logits_of(functional_call(small, sliced_and_merged(supernet, small, subnet), (), inputs("left")))
        assert distance(logits.detach(), by_hand.detach()) < (1e-5 if dtype == torch.float32 else 1e-12)
        weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)
        ours, right = (
            torch.autograd.grad((y * weights).sum(), trained.values(), allow_unused=True, materialize_grads=True)
            for y in (logits, by_hand)
        )
        scale = max(g.abs().max().item() for g in right)
        for place, mine, expected in zip(trained, ours, right, strict=True):
            # Some are zero but for rounding, e.g. of a key's adapter where one token sees only itself.
            assert (mine - expected).norm() < tolerance * max(expected.norm().item(), 1e-2 * scale), (subnet, place)
        assert sum(bool(g.any()) for g in ours) > len(ours) // 4


def silenced(name: str, model: PreTrainedModel, subnet: Subnet) -> PreTrainedModel:
    """The original model, all sizes whole, in which nothing reads the heads and units that `subnet` lacks."""
    supernet = SuperTransformer(copy.deepcopy(model), space_of(name))
    base = model.base_model
    layers = base.get_submodule(supernet.family.layers)
    for i, block in enumerate(layers):
        for path, spec in supernet.family.layer.items():
            if isinstance(spec, Linear) and spec.reads in ("heads", "ffn"):
                size = subnet.per_layer(spec.reads)[i] * (supernet.dimensions.head_dim if spec.reads == "heads" else 1)
                module = block.get_submodule(path)
                matrix = module.weight if isinstance(module, nn.Linear) else module.weight.T
                matrix.data[:, size:] = 0
    return model


@every_model
def test_fewer_heads_and_units_equal_the_whole_model_with_the_others_silenced(name, suffix):
    few, mid, all_ = sorted(CASES[name].heads)
    subnet = Subnet(HIDDEN[0], (mid, few, all_, few), (24, 40, 16, 24), (0, 1, 2, 3))
    supernet = SuperTransformer(make(name, suffix, dtype=torch.float64), space_of(name))
    expected = silenced(name, make(name, suffix, dtype=torch.float64), subnet)
    with torch.no_grad(), supernet.activate(subnet):
        for side in ("left", "right"):
            assert distance(logits_of(supernet(**inputs(side))), logits_of(expected(**inputs(side)))) < 1e-12


@every_model
def test_dropped_layers_equal_the_original_model_without_them(name, suffix):
    model = make(name, suffix, dtype=torch.float64)
    supernet = SuperTransformer(copy.deepcopy(model), space_of(name))
    owner, _, leaf = supernet.layers_name.rpartition(".")
    layers = list(model.get_submodule(supernet.layers_name))
    setattr(model.get_submodule(owner), leaf, nn.ModuleList(layers[i] for i in (1, 3)))
    model.config.num_hidden_layers = 2
    for config in {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}.values():
        config.num_hidden_layers = 2
        if getattr(config, "layer_types", None):
            config.layer_types = [supernet.config.layer_types[i] for i in (1, 3)]
    subnet = Subnet(HIDDEN[0], CASES[name].heads[0], 40, (1, 3))
    with torch.no_grad(), supernet.activate(subnet):
        batch = inputs("left") | ({"use_cache": False} if CASES[name].is_decoder else {})
        assert distance(logits_of(supernet(**batch)), logits_of(model(**batch))) < 1e-12


@every_model
def test_training_mode_without_dropout_equals_the_extracted_model(name, suffix):
    supernet = elastic(name, suffix, torch.float64)
    for module in supernet.modules():
        for attribute, value in list(vars(module).items()):
            if isinstance(value, float) and ("dropout" in attribute or isinstance(module, nn.Dropout)):
                setattr(module, attribute, 0.0)
    subnet = subnets_of(name)["per layer, without layer 0"]
    with torch.no_grad(), supernet.activate(subnet):
        expected = logits_of(supernet(**inputs()))
        small = supernet.train().extract(subnet)
        assert small.training and all(module.training for module in small.modules())
        assert distance(logits_of(supernet(**inputs())), expected) < 1e-12
        assert distance(logits_of(small(**inputs())), expected) < 1e-12


@every_model
def test_extracted_model_bears_no_trace_of_mlfs(name, suffix):
    supernet = elastic(name, suffix)
    assert b"mlfs" not in pickle.dumps(supernet.extract(subnets_of(name)["uniform"]))
    with torch.no_grad():
        supernet(**inputs(), output_hidden_states=True)  # transformers then leaves hooks of its own
    for subnet in (subnets_of(name)["uniform"], subnets_of(name)["per layer, without layer 0"]):
        small = supernet.extract(subnet)
        exportable = supernet.is_exportable(subnet)
        for module in small.modules():
            assert not any(kind.__module__.startswith("mlfs") for kind in type(module).__mro__)
            assert not isinstance(module, (Elastic, FollowsSubnet))
            for key, value in vars(module).items():
                if exportable or key not in ("save_pretrained", "push_to_hub"):  # which there say why it cannot be
                    assert not str(getattr(value, "__module__", "")).startswith("mlfs"), key
                    assert not type(value).__module__.startswith("mlfs"), key
            for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values()):
                assert not hook.__module__.startswith("mlfs")
        original = make(name, suffix)
        assert {re.sub(r"\.\d+\.", ".", key) for key in small.state_dict()} == {
            re.sub(r"\.\d+\.", ".", key) for key in original.state_dict()
        }
        assert {type(m) for m in small.modules()} == {type(m) for m in original.modules()}
        assert all(p.requires_grad for p in small.parameters())


@every_model
def test_extracted_model_has_storage_of_its_own_and_the_super_transformer_is_untouched(name, suffix):
    supernet = elastic(name, suffix)
    before = {key: value.clone() for key, value in supernet.state_dict().items()}
    flags = {key: p.requires_grad for key, p in supernet.named_parameters()}
    theirs = {p.untyped_storage().data_ptr() for p in supernet.model.parameters()}
    for subnet in subnets_of(name).values():
        small = supernet.extract(subnet)
        with torch.no_grad():
            for parameter in small.parameters():
                assert parameter.untyped_storage().data_ptr() not in theirs
                assert parameter.is_contiguous()
                assert parameter.untyped_storage().nbytes() == parameter.numel() * parameter.element_size()
                parameter.zero_()
    after = supernet.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert {key: p.requires_grad for key, p in supernet.named_parameters()} == flags


def test_extracted_model_whose_layers_differ_survives_pickle():
    supernet, subnet = elastic("llama", "ForCausalLM"), subnets_of("llama")["per layer, full depth"]
    small = supernet.extract(subnet)
    for twin in (copy.deepcopy(small), pickle.loads(pickle.dumps(small))):
        with torch.no_grad():
            assert torch.equal(twin(**inputs()).logits, small(**inputs()).logits)


@every_model
def test_tied_weights_are_tied_in_the_extracted_model_too(name, suffix):
    supernet = elastic(name, suffix)
    small = supernet.extract(subnets_of(name)["per layer, full depth"])

    def shared(model: nn.Module) -> set[frozenset[str]]:
        places: dict[int, set[str]] = {}
        for key, parameter in model.named_parameters(remove_duplicate=False):
            places.setdefault(id(parameter), set()).add(key)
        return {frozenset(keys) for keys in places.values() if len(keys) > 1}

    assert shared(small) == shared(make(name, suffix))
