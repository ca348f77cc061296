"""A rotation goes with a run that is saved, with a state, and with an object."""

import copy
import itertools
import pickle

import pytest
import torch
import transformers as tf

from mlfs import MLFSError, SuperTransformer
from mlfs.supernet import parallel
from tests.helpers.calibration import active, batches
from tests.helpers.rotations import (
    FIRST,
    ROTATABLE,
    TIED,
    assert_rotated_alike,
    order_of,
    orthogonal,
    rotated,
)
from tests.helpers.runs import same_tensors, stored
from tests.supernet.test_state import CARRIERS, fresh
from tests.supernet.test_vocabulary import resized
from tests.supernets import distance, elastic, perturb, space_of
from tests.tiny_models import CASES, VOCABULARY, inputs, make

every_model = pytest.mark.parametrize(("name", "suffix"), ROTATABLE)
every_family = pytest.mark.parametrize(("name", "suffix"), FIRST)


# ---- on disk --------------------------------------------------------------------------------------------------------


@every_model
def test_a_saved_run_loads_and_restores_bit_for_bit(name, suffix, tmp_path):
    supernet = rotated(name, suffix)
    supernet.save_pretrained(tmp_path / "run")
    assert torch.equal(stored(tmp_path / "run")["rotation"], supernet.rotation)
    loaded = SuperTransformer.from_pretrained(tmp_path / "run", model=make(name, suffix)).eval()
    assert_rotated_alike(loaded, supernet, name)
    ordered, alike = fresh(name, suffix), rotated(name, suffix)
    ordered.order("magnitude")
    alike.apply_permutation(order_of(name, [*range(20, 40), *range(20)]))
    for i, twin in enumerate((loaded, fresh(name, suffix), ordered, alike)):
        twin.restore(tmp_path / "run")
        assert_rotated_alike(twin, supernet, name)
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
    assert_rotated_alike(twin, supernet, name)
    twin.save_pretrained(tmp_path / "run")
    again = SuperTransformer.from_pretrained(tmp_path / "run", model=make(name, suffix)).eval()
    assert_rotated_alike(again, supernet, name)
    twin.model.tie_weights()
    assert_rotated_alike(twin, supernet, name)


@pytest.mark.parametrize("carry", [copy.deepcopy, lambda supernet: pickle.loads(pickle.dumps(supernet))])
def test_copies_are_rotated_too(carry, tmp_path):
    supernet = rotated(*TIED)
    twin = carry(supernet)
    assert_rotated_alike(twin, supernet, "llama-tied")
    twin.save_pretrained(tmp_path)
    assert_rotated_alike(SuperTransformer.from_pretrained(tmp_path, model=make(*TIED)).eval(), supernet, "llama-tied")
    twin.load_state_dict(rotated(*TIED, seed=1).state_dict())
    assert_rotated_alike(twin, rotated(*TIED, seed=1), "llama-tied")


def test_a_model_without_memory_takes_a_rotated_state():
    supernet = rotated(*TIED)
    with torch.device("meta"):
        twin = SuperTransformer(
            tf.LlamaForCausalLM(CASES["llama-tied"].config()), supernet.space, rank=4, alpha=8.0
        ).eval()
    twin.load_state_dict({key: value.clone() for key, value in supernet.state_dict().items()}, assign=True)
    twin.model.model.rotary_emb = supernet.model.model.rotary_emb  # whose buffer is in no state
    assert_rotated_alike(twin, supernet, "llama-tied")


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
