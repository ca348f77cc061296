"""A rotated residual stream leaves the whole model what it was, and is carried by everything that carries the order."""

import copy
import itertools
import pickle
from collections.abc import Sequence

import pytest
import torch
import transformers as tf
from torch import nn

from mlfs import MLFSError, Subnet, SuperTransformer
from mlfs.supernet import parallel
from mlfs.supernet.moments import collecting_moment, principal_axes
from mlfs.supernet.permutation import Permutation, permutation_of
from tests.helpers.calibration import active, batches
from tests.helpers.rotations import FIRST, ODD, ODD_SPACE, OTHERS, ROTATABLE, odd_model, odd_supernet, orthogonal
from tests.helpers.runs import exportable, same_tensors, stored
from tests.supernet.test_state import CARRIERS, fresh
from tests.supernet.test_vocabulary import resized
from tests.supernets import distance, elastic, parameters_of, perturb, space_of, subnets_of
from tests.tiny_models import CASES, VOCABULARY, inputs, logits_of, make

every_model = pytest.mark.parametrize(("name", "suffix"), ROTATABLE)
every_family = pytest.mark.parametrize(("name", "suffix"), FIRST)
every_odd_model = pytest.mark.parametrize(("name", "tied"), [*itertools.product(ODD, (False, True))])
TIED = ("llama-tied", "ForCausalLM")


def rotated(name: str, suffix: str, seed: int = 0) -> SuperTransformer:
    """A small model with trained stages that was rotated, and then ordered."""
    supernet = elastic(name, suffix)
    supernet.apply_rotation(orthogonal(seed=seed))
    supernet.apply_permutation(order_of(name))
    return supernet


def order_of(name: str, units: Sequence[int] = range(39, -1, -1)) -> Permutation:
    """Gives heads and feed-forward units of two layers another order."""
    groups = 6 if name == "llama-mqa" else 3
    return {("heads", 1): [*range(1, groups), 0], ("ffn", 2): list(units)}


def assert_equal(twin: SuperTransformer, supernet: SuperTransformer, name: str) -> None:
    """Compares what was done to two super-transformers, and every size, bit for bit."""
    assert twin.rotation is not None and torch.equal(twin.rotation, supernet.rotation)
    assert ("hidden", None) not in twin.permutation
    for subnet in subnets_of(name).values():
        assert torch.equal(active(twin, subnet), active(supernet, subnet))


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
def test_heads_and_units_are_ordered_by_gradient_or_without_labels_by_activation(labelled):
    data = batches("ForCausalLM")
    if not labelled:
        data = [{key: value for key, value in batch.items() if key != "labels"} for batch in data]
    supernet = elastic("llama", "ForCausalLM")
    scores = supernet.importance("gradient" if labelled else "activation", data)
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


# ---- on disk --------------------------------------------------------------------------------------------------------


@every_model
def test_a_saved_run_loads_and_restores_bit_for_bit(name, suffix, tmp_path):
    supernet = rotated(name, suffix)
    supernet.save_pretrained(tmp_path / "run")
    assert torch.equal(stored(tmp_path / "run")["rotation"], supernet.rotation)
    loaded = SuperTransformer.from_pretrained(tmp_path / "run", model=make(name, suffix)).eval()
    assert_equal(loaded, supernet, name)
    ordered, alike = fresh(name, suffix), rotated(name, suffix)
    ordered.order("magnitude")
    alike.apply_permutation(order_of(name, [*range(20, 40), *range(20)]))
    for i, twin in enumerate((loaded, fresh(name, suffix), ordered, alike)):
        twin.restore(tmp_path / "run")
        assert_equal(twin, supernet, name)
        twin.save_pretrained(tmp_path / f"again {i}")
        assert same_tensors(stored(tmp_path / f"again {i}"), stored(tmp_path / "run"))


def test_a_run_in_a_folder_finds_its_tied_base(tmp_path):
    make(*TIED).save_pretrained(tmp_path / "base")
    base = tf.LlamaForCausalLM.from_pretrained(tmp_path / "base").eval()
    supernet = SuperTransformer(base, rank=2)
    supernet.apply_rotation(orthogonal())
    supernet.save_pretrained(tmp_path / "run")
    twin = SuperTransformer.from_pretrained(tmp_path / "run").eval()
    assert torch.equal(active(twin), active(supernet))
    assert torch.equal(active(twin, twin.space.min), active(supernet, twin.space.min))
    assert twin.fingerprint() == SuperTransformer(make(*TIED)).fingerprint()


@every_family
def test_rows_of_tokens_that_the_base_did_not_have_are_rotated_too(name, suffix, tmp_path):
    make(name, suffix).save_pretrained(tmp_path / "base")

    def fresh_resized(seed: int) -> SuperTransformer:
        base = resized(name, suffix, tmp_path / "base", VOCABULARY + 7, seed)
        return SuperTransformer(base, space_of(name), rank=4).eval()

    supernet = perturb(fresh_resized(1)).eval()
    batch = inputs("left")
    batch["input_ids"][:, -2] = VOCABULARY + 6
    with torch.no_grad():
        before = supernet(**batch).logits
        supernet.order("rotation", batches(suffix))
        assert distance(supernet(**batch).logits, before) < 1e-5
        supernet.save_pretrained(tmp_path / "run")
        assert len(stored(tmp_path / "run")["model.embed_tokens.weight.added_rows"]) == 7
        twins = [SuperTransformer.from_pretrained(tmp_path / "run").eval(), fresh_resized(2), fresh_resized(3)]
        twins[1].restore(tmp_path / "run")
        twins[2].load_state_dict(supernet.state_dict())
        for twin, subnet in itertools.product(twins, (supernet.space.max, supernet.space.min)):
            with supernet.activate(subnet), twin.activate(subnet):
                assert torch.equal(twin(**batch).logits, supernet(**batch).logits)


@pytest.mark.parametrize("changed", ["model.norm.weight", "model.layers.1.input_layernorm.weight"])
def test_what_a_changed_norm_is_folded_into_is_saved_with_the_run(changed, tmp_path):
    make(*TIED).save_pretrained(tmp_path / "base")
    base = tf.LlamaForCausalLM.from_pretrained(tmp_path / "base").eval()
    base.get_parameter(changed).data.mul_(torch.linspace(0.5, 2, 48))
    supernet = SuperTransformer(base, rank=2)
    supernet.apply_rotation(orthogonal())
    supernet.save_pretrained(tmp_path / "run")
    twins = [SuperTransformer.from_pretrained(tmp_path / "run"), SuperTransformer(copy.deepcopy(make(*TIED)), rank=2)]
    twins[1].load_state_dict(supernet.state_dict())
    for twin in twins:
        twin.eval()
        assert torch.equal(active(twin), active(supernet)) and twin.new_parameters == supernet.new_parameters
    twins[1].save_pretrained(tmp_path / "again")
    assert same_tensors(stored(tmp_path / "again"), stored(tmp_path / "run"))


# ---- by its state, or as an object ----------------------------------------------------------------------------------

# These write into the tensors that are there, which are those of a rotated model only once it is rotated.
_INTO_ROTATED_ALONE = ("distributed_checkpoint", "in_place")
_CARRIED = [
    (how, target)
    for how, target in itertools.product(CARRIERS, ("fresh", "rotated"))
    if target == "rotated" or how not in _INTO_ROTATED_ALONE
]


@pytest.mark.parametrize(("how", "target"), _CARRIED)
@pytest.mark.parametrize(("name", "suffix"), [("llama", "ForSequenceClassification"), TIED])
def test_a_state_carries_the_rotation(name, suffix, how, target, tmp_path):
    supernet, carry = rotated(name, suffix), CARRIERS[how]
    twin = fresh(name, suffix) if target == "fresh" else rotated(name, suffix, seed=1)
    if how not in _INTO_ROTATED_ALONE:
        twin.merge_stages(1)  # the copy is of what was there before
    carry(supernet, twin, tmp_path)
    assert_equal(twin, supernet, name)
    twin.save_pretrained(tmp_path / "run")
    again = SuperTransformer.from_pretrained(tmp_path / "run", model=make(name, suffix)).eval()
    assert_equal(again, supernet, name)
    twin.model.tie_weights()
    assert_equal(twin, supernet, name)


@pytest.mark.parametrize("carry", [copy.deepcopy, lambda supernet: pickle.loads(pickle.dumps(supernet))])
def test_copies_are_rotated_too(carry, tmp_path):
    supernet = rotated(*TIED)
    twin = carry(supernet)
    assert_equal(twin, supernet, "llama-tied")
    twin.save_pretrained(tmp_path)
    assert_equal(SuperTransformer.from_pretrained(tmp_path, model=make(*TIED)).eval(), supernet, "llama-tied")
    twin.load_state_dict(rotated(*TIED, seed=1).state_dict())
    assert_equal(twin, rotated(*TIED, seed=1), "llama-tied")


def test_a_model_without_memory_takes_a_rotated_state():
    supernet = rotated(*TIED)
    with torch.device("meta"):
        twin = SuperTransformer(
            tf.LlamaForCausalLM(CASES["llama-tied"].config()), supernet.space, rank=4, alpha=8.0
        ).eval()
    twin.load_state_dict({key: value.clone() for key, value in supernet.state_dict().items()}, assign=True)
    twin.model.model.rotary_emb = supernet.model.model.rotary_emb  # whose buffer is in no state
    assert_equal(twin, supernet, "llama-tied")


def test_processes_of_which_only_some_are_rotated_are_refused(monkeypatch):
    monkeypatch.setattr(parallel.dist, "get_global_rank", lambda *_: 0)
    monkeypatch.setattr(parallel.dist, "broadcast", lambda tensor, **_: tensor.fill_(48 * 48 * 4))
    with pytest.raises(MLFSError, match="of some processes are rotated, of others not"):
        parallel._share(fresh(*TIED).record, None)


def test_a_base_in_half_precision_is_rotated_within_its_rounding():
    supernet = SuperTransformer(make("llama", "ForCausalLM", dtype=torch.bfloat16), rank=2)
    before = active(supernet)
    supernet.order("rotation", batches("ForCausalLM"))
    assert distance(active(supernet), before) < 0.05
    assert {p.dtype for p in supernet.base_parameters().values()} == {torch.bfloat16}


def test_the_matrix_outlives_a_change_of_type():
    supernet = rotated("llama", "ForCausalLM")
    expected = supernet.rotation.clone()
    supernet.to(torch.bfloat16)
    supernet.load_state_dict(supernet.state_dict())
    assert torch.equal(supernet.rotation, expected)


@pytest.mark.parametrize(("name", "suffix"), [("llama", "ForCausalLM"), TIED])
def test_a_state_that_is_not_rotated_is_refused_by_one_that_is_before_anything_is_loaded(name, suffix):
    supernet = rotated(name, suffix)
    before = active(supernet)
    with pytest.raises(MLFSError, match="is not rotated, and this one's is: load it into one of the base") as raised:
        supernet.load_state_dict(elastic(name, suffix).state_dict())
    assert "\n" not in str(raised.value) and torch.equal(active(supernet), before)


def test_a_state_of_an_earlier_version_which_knew_no_rotation_is_loaded():
    supernet, twin = elastic(*TIED), fresh(*TIED)
    supernet.order("magnitude")
    state = supernet.state_dict()
    del state["model.mlfs_record.rotation"]
    twin.load_state_dict(state)
    assert twin.rotation is None and torch.equal(active(twin), active(supernet))


def test_an_average_over_different_rotations_is_refused():
    one, other = (rotated("llama", "ForCausalLM", seed).state_dict() for seed in (0, 1))
    twin = fresh("llama", "ForCausalLM")
    for copied in (True, False):
        state = {
            key: value if copied and not value.is_floating_point() else 0.5 * one[key] + 0.5 * value
            for key, value in other.items()
        }
        with pytest.raises(MLFSError, match="average only states that were ordered alike"):
            twin.load_state_dict(state)
    same = {key: 0.9 * value + 0.1 * value for key, value in one.items()}
    twin = fresh("llama", "ForCausalLM")
    twin.load_state_dict(same)
    assert torch.equal(twin.rotation, rotated("llama", "ForCausalLM").rotation)


def test_a_rotated_state_that_is_written_over_a_tied_head_is_refused():
    supernet, twin = rotated(*TIED), fresh(*TIED)
    state = supernet.state_dict()
    for key, own in twin.state_dict(keep_vars=True).items():
        own.data = state[key].clone()
    with pytest.raises(MLFSError, match="load it with load_state_dict"):
        active(twin)


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
    assert_equal(twin, supernet, "llama")
    subnet = Subnet(32, 4, 24, (0, 2, 3))
    with torch.no_grad():
        assert distance(supernet.extract(subnet)(**inputs("left")).logits, active(supernet, subnet)) < 1e-5
