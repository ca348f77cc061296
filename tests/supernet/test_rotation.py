"""A rotated residual stream leaves the whole model what it was, and any size of it can be exported."""

import itertools

import pytest
import torch
import transformers as tf
from torch import nn

from mlfs import MLFSError, Subnet, SuperTransformer
from mlfs.supernet.moments import collecting_moment, principal_axes
from mlfs.supernet.permutation import permutation_of
from tests.helpers.calibration import active, batches
from tests.helpers.rotations import (
    FIRST,
    ODD,
    ODD_SPACE,
    OTHERS,
    ROTATABLE,
    TIED,
    assert_rotated_alike,
    odd_model,
    odd_supernet,
    orthogonal,
    rotated,
)
from tests.helpers.runs import exportable
from tests.supernets import distance, elastic, parameters_of
from tests.tiny_models import CASES, inputs, logits_of, make

every_model = pytest.mark.parametrize(("name", "suffix"), ROTATABLE)
every_family = pytest.mark.parametrize(("name", "suffix"), FIRST)
every_odd_model = pytest.mark.parametrize(("name", "tied"), [*itertools.product(ODD, (False, True))])


# ---- what it does ---------------------------------------------------------------------------------------------------


@every_model
def test_order_by_rotation_leaves_the_whole_model_what_it_was(name, suffix):
    supernet = elastic(name, suffix)
    before = {side: active(supernet, side=side) for side in ("left", "right")}
    narrow = active(supernet, supernet.space.min)
    supernet.order("rotation", batches(suffix))
    for side, expected in before.items():
        assert distance(active(supernet, side=side), expected) < 1e-5
    assert distance(active(supernet, supernet.space.min), narrow) > 1e-2
    assert {axis for axis, _ in supernet.permutation} == {"heads", "ffn"} or name == "llama-mqa"


@every_odd_model
def test_every_subnet_of_full_width_computes_the_same_in_float64(name, tied):
    supernet = odd_supernet(name, tied)
    full_width = [subnet for subnet in ODD_SPACE.uniform() if subnet.hidden == 45]
    before = [active(supernet, subnet) for subnet in full_width]
    supernet.apply_rotation(orthogonal(45))
    for subnet, expected in zip(full_width, before, strict=True):
        assert distance(active(supernet, subnet), expected) < 1e-12
    assert all(torch.all(norm.own_weight == 1) for norm in (supernet.model.model.norm, *_norms(supernet)))


def _norms(supernet: SuperTransformer) -> list[nn.Module]:
    layers = supernet.layers
    return [norm for layer in layers for norm in (layer.input_layernorm, layer.post_attention_layernorm)]


@every_odd_model
def test_every_uniform_subnet_that_is_extracted_computes_what_the_active_one_does(name, tied):
    supernet = odd_supernet(name, tied)
    supernet.order("rotation", batches("ForCausalLM"))
    for subnet in ODD_SPACE.uniform():
        small = supernet.extract(subnet)
        with torch.no_grad():
            assert distance(logits_of(small(**inputs("left"))), active(supernet, subnet)) < 1e-12
        assert supernet.count_parameters(subnet) == parameters_of(small)
        small.tie_weights()
        assert small.lm_head.weight is not small.model.embed_tokens.weight


@every_odd_model
def test_the_second_moment_is_that_of_plain_torch_without_padding(name, tied):
    plain = odd_model(name, tied)
    expected = torch.zeros(45, 45, dtype=torch.float64)
    for batch in batches("ForCausalLM"):
        seen: list[torch.Tensor] = []
        names = ("input_layernorm", "post_attention_layernorm", "model.norm")
        norms = [module for path, module in plain.named_modules() if path.endswith(names)]
        handles = [norm.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0])) for norm in norms]
        with torch.no_grad():
            plain(**batch)
        for handle in handles:
            handle.remove()
        assert len(seen) == 7
        for x, row in itertools.product(seen, range(3)):
            for numbers in x[row][batch["attention_mask"][row] == 1]:
                unit = numbers / (numbers.pow(2).mean() + 1e-6).sqrt()
                expected += torch.outer(unit, unit)
    supernet = SuperTransformer(plain, ODD_SPACE, rank=2)
    with torch.no_grad(), collecting_moment(supernet) as moment:
        for batch in batches("ForCausalLM"):
            supernet(**batch)
    assert distance(moment, expected) < 1e-12
    axes = principal_axes(moment)
    energies = (axes.t() @ expected @ axes).diagonal()
    assert torch.all(energies.diff() <= 0) and distance(energies.sum(), expected.trace()) < 1e-12
    supernet.order("rotation", batches("ForCausalLM"))
    assert distance(supernet.rotation.double(), axes) < 1e-6


def test_what_the_stream_never_holds_goes_to_its_end():
    model = odd_model("llama with biases", tied=False)
    kept = orthogonal(45)[:, :17]
    projection = kept @ kept.t()
    embeddings = model.model.embed_tokens.weight
    embeddings.data = embeddings.data @ projection
    for layer in model.model.layers:
        for linear in (layer.self_attn.o_proj, layer.mlp.down_proj):
            linear.weight.data, linear.bias.data = projection @ linear.weight.data, projection @ linear.bias.data
    supernet = SuperTransformer(model, ODD_SPACE, rank=2)
    supernet.order("rotation", batches("ForCausalLM"))
    with torch.no_grad():
        stream = supernet(**inputs(), output_hidden_states=True).hidden_states
    for numbers in stream:
        assert numbers[..., 17:].abs().max() < 1e-6 * numbers.abs().max()  # the matrix is recorded in fp32


@pytest.mark.parametrize("labelled", [True, False])
def test_heads_and_units_are_ordered_by_gradient_with_labels_or_without(labelled):
    data = batches("ForCausalLM")
    if not labelled:
        data = [{key: value for key, value in batch.items() if key != "labels"} for batch in data]
    supernet = elastic("llama", "ForCausalLM")
    scores = supernet.importance("gradient", data)
    supernet.order("rotation", iter(data))
    expected = permutation_of({key: values for key, values in scores.items() if key[0] != "hidden"})
    assert supernet.permutation == expected


@every_family
def test_generated_tokens_stay(name, suffix):
    supernet = elastic(name, suffix)
    prompt = inputs("left")
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 1}
    before = supernet.generate(**prompt, **options)
    supernet.order("rotation", batches(suffix))
    assert torch.equal(supernet.generate(**prompt, **options), before)


def test_a_rotation_while_stages_are_merged_stays_right():
    supernet = odd_supernet("llama with biases", tied=True)
    before = active(supernet)
    supernet.merge_stages(2)
    supernet.apply_rotation(orthogonal(45))
    assert supernet.merged_stages == 2 and distance(active(supernet), before) < 1e-6  # the copy is in fp32
    merged = active(supernet, ODD_SPACE.min)
    supernet.merge_stages(0)
    assert distance(active(supernet, ODD_SPACE.min), merged) < 1e-6


@pytest.mark.parametrize("when", ["before", "after"])
def test_an_order_of_the_stream_is_part_of_the_rotation(when):
    supernet, twin = odd_supernet("mistral", tied=True), odd_supernet("mistral", tied=True)
    before, matrix = active(supernet), orthogonal(45)
    order = torch.randperm(45, generator=torch.Generator().manual_seed(3)).tolist()
    permutation = {("hidden", None): order, ("heads", 0): [1, 2, 0]}
    if when == "before":
        supernet.apply_permutation(permutation)
        supernet.apply_rotation(matrix)
        rows = torch.empty_like(matrix)
        rows[order] = matrix
        twin.apply_rotation(rows)
    else:
        supernet.apply_rotation(matrix)
        supernet.apply_permutation(permutation)
        twin.apply_rotation(matrix[:, order])
    twin.apply_permutation({("heads", 0): [1, 2, 0]})
    assert distance(active(supernet), before) < 1e-12
    assert torch.equal(supernet.rotation, twin.rotation) and supernet.permutation == twin.permutation
    for subnet in ODD_SPACE.uniform():
        assert distance(active(supernet, subnet), active(twin, subnet)) < 1e-12


# ---- the head -------------------------------------------------------------------------------------------------------


def test_a_tied_head_gets_a_matrix_of_its_own_and_stays_untied(monkeypatch, tmp_path):
    said: list[str] = []
    monkeypatch.setattr("mlfs.supernet.rotation.logger.warning_once", said.append)
    supernet = elastic(*TIED)
    count = supernet.count_parameters(supernet.space.max)
    expected = active(supernet)
    supernet.apply_rotation(orthogonal())
    supernet.model.tie_weights()
    supernet.model.tie_weights(recompute_mapping=False)
    assert supernet.resize_token_embeddings(61) is supernet.get_input_embeddings()
    assert distance(active(supernet), expected) < 1e-5
    assert len(said) == 1 and f"{61 * 48 * 4:,} bytes" in said[0] and "\n" not in said[0]
    assert supernet.count_parameters(supernet.space.max) == count + 61 * 48
    supernet.save_pretrained(tmp_path / "run")
    supernet.model.save_pretrained(tmp_path / "plain")
    plain = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    assert plain.config.tie_word_embeddings is False
    with torch.no_grad():
        assert distance(plain(**inputs("left")).logits, expected) < 1e-5


@every_model
def test_an_exported_size_loads_with_transformers_alone(name, suffix, tmp_path):
    supernet = rotated(name, suffix)
    for i, subnet in enumerate(exportable(name)):
        supernet.extract(subnet).save_pretrained(tmp_path / str(i))
        plain, info = getattr(tf, CASES[name].name + suffix).from_pretrained(
            tmp_path / str(i), output_loading_info=True
        )
        assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        with torch.no_grad():
            assert distance(logits_of(plain.eval()(**inputs("left"))), active(supernet, subnet)) < 1e-5


# ---- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "suffix"), OTHERS)
def test_a_family_that_cannot_be_rotated_says_why_and_the_way_out(name, suffix):
    supernet = elastic(name, suffix)
    before = {key: value.clone() for key, value in supernet.state_dict().items()}
    for rotate in (
        lambda: supernet.order("rotation", batches(suffix)),
        lambda: supernet.apply_rotation(orthogonal()),
    ):
        with pytest.raises(
            MLFSError, match=r"cannot be rotated: its LayerNorms subtract a mean.* 'gradient'"
        ) as raised:
            rotate()
        assert "\n" not in str(raised.value)
    assert all(torch.equal(before[key], value) for key, value in supernet.state_dict().items())


def test_a_model_without_a_head_is_refused():
    torch.manual_seed(0)
    supernet = SuperTransformer(tf.LlamaModel(CASES["llama"].config()), rank=2)
    with pytest.raises(MLFSError, match="it has no head"):
        supernet.apply_rotation(orthogonal())


@pytest.mark.parametrize(
    ("matrix", "message"),
    [
        (orthogonal(47), r"expected a rotation of shape \(48, 48\)"),
        (torch.eye(48, dtype=torch.int64), "of floating-point numbers"),
        (torch.eye(48).tolist(), "of floating-point numbers"),
        (torch.full((48, 48), torch.nan), "is not orthogonal"),
        (torch.eye(48) * 1.01, "is not orthogonal"),
    ],
)
def test_a_matrix_that_is_no_rotation_is_refused_and_nothing_changes(matrix, message):
    supernet = elastic(*TIED)
    before = active(supernet)
    with pytest.raises(MLFSError, match=message):
        supernet.apply_rotation(matrix)
    assert torch.equal(active(supernet), before) and supernet.rotation is None
    assert supernet.config.tie_word_embeddings


def test_a_second_rotation_and_one_after_norms_have_trained_are_refused(tmp_path):
    supernet = rotated("llama", "ForCausalLM")
    with pytest.raises(MLFSError, match=r"rotated already: .* load the base anew"):
        supernet.order("rotation", batches("ForCausalLM"))
    supernet.save_pretrained(tmp_path / "rotated")
    rotated("llama", "ForCausalLM", seed=1).save_pretrained(tmp_path / "otherwise")
    elastic("llama", "ForCausalLM").save_pretrained(tmp_path / "not")
    for folder, how in (("otherwise", "by another matrix"), ("not", "not")):
        with pytest.raises(MLFSError, match=f"rotated already, in .* {how}: restore into .* loaded anew"):
            supernet.restore(tmp_path / folder)
    trained = elastic("llama", "ForCausalLM")
    trained.train_stage(0, norms=True)
    with pytest.raises(MLFSError, match="norm trains, or has trained"):
        trained.apply_rotation(orthogonal())


def test_missing_or_masked_batches_are_refused():
    supernet = elastic("llama", "ForCausalLM")
    hidden = inputs() | {"attention_mask": torch.zeros(3, 11, dtype=torch.int64)}
    for data, message in ((None, "needs batches"), ([], "no batch"), ([hidden], "no token counts")):
        with pytest.raises(MLFSError, match=message):
            supernet.order("rotation", data)
    assert supernet.rotation is None


def test_norms_may_train_once_the_stream_is_rotated(tmp_path):
    supernet = rotated("llama", "ForCausalLM")
    supernet.train_stage(2, norms=True)
    with torch.no_grad():
        supernet.model.model.norm.own_weight.mul_(torch.linspace(0.5, 2, 48))
    supernet.save_pretrained(tmp_path)
    twin = SuperTransformer.from_pretrained(tmp_path, model=make("llama", "ForCausalLM")).eval()
    assert_rotated_alike(twin, supernet, "llama")
    subnet = Subnet(32, 4, 24, (0, 2, 3))
    with torch.no_grad():
        assert distance(supernet.extract(subnet)(**inputs("left")).logits, active(supernet, subnet)) < 1e-5
