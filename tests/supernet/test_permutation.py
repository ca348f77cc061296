"""A new order of the units leaves the whole model what it was, composes, and can be undone."""

import math

import pytest
import torch

from mlfs import MLFSError, Subnet, SuperTransformer
from mlfs.supernet.permutation import compose
from tests.helpers.calibration import METHODS, active, batches
from tests.supernets import distance, elastic, space_of, subnets_of
from tests.tiny_models import CASES, PAD, VOCABULARY, all_models, inputs, logits_of, make

every_model = pytest.mark.parametrize(("name", "suffix"), all_models())
FIRST = [(name, case.classes[0]) for name, case in CASES.items()]


every_family = pytest.mark.parametrize(("name", "suffix"), FIRST)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)], ids=["fp32", "fp64"])
@every_model
def test_order_leaves_the_whole_model_what_it_was(name, suffix, dtype, tolerance):
    # transformers' RMSNorms round to fp32 whatever the type, in whatever order the units come.
    if dtype == torch.float64 and ("llama" in name or name in ("mistral", "qwen2", "qwen3")):
        tolerance = 1e-6
    for method in METHODS:
        supernet = elastic(name, suffix, dtype)
        before = {side: active(supernet, side=side) for side in ("left", "right")}
        supernet.order(method, batches(suffix))
        for side, expected in before.items():
            assert distance(active(supernet, side=side), expected) < tolerance, method
        moved = [key for key, order in supernet.permutation.items() if order != sorted(order)]
        assert len(moved) >= 6, "next to nothing moved"
        assert {axis for axis, _ in moved} == {"hidden", "heads", "ffn"}


@every_model
def test_after_order_an_extracted_subnet_still_equals_the_active_one(name, suffix):
    supernet = elastic(name, suffix, torch.float64)
    supernet.order("gradient", batches(suffix))
    for subnet in subnets_of(name).values():
        with torch.no_grad():
            assert distance(logits_of(supernet.extract(subnet)(**inputs("left"))), active(supernet, subnet)) < 1e-12


@every_family
def test_two_orders_compose(name, suffix):
    supernet = elastic(name, suffix, torch.float64)
    before = active(supernet)
    supernet.order("magnitude")
    first = supernet.permutation
    supernet.order("gradient", batches(suffix))
    second = supernet.permutation
    assert first != second
    assert distance(active(supernet), before) < 1e-6
    twin = elastic(name, suffix, torch.float64)
    twin.apply_permutation(second)
    ours, theirs = supernet.state_dict(), twin.state_dict()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    again = dict(supernet.permutation)
    supernet.order("magnitude")
    assert distance(active(supernet), before) < 1e-6
    assert compose(again, {}) == again


@every_family
def test_order_undone_restores_every_weight_bit_for_bit(name, suffix):
    supernet = elastic(name, suffix)
    before = {key: value.clone() for key, value in supernet.state_dict().items()}
    supernet.order("magnitude")
    assert any(not torch.equal(before[key], value) for key, value in supernet.state_dict().items())
    inverse = {key: torch.tensor(order).argsort().tolist() for key, order in supernet.permutation.items()}
    supernet.apply_permutation(inverse)
    assert all(torch.equal(before[key], value) for key, value in supernet.state_dict().items())
    assert all(order == sorted(order) for order in supernet.permutation.values())


@every_family
def test_order_while_stages_are_merged_stays_right(name, suffix):
    supernet = elastic(name, suffix, torch.float64)
    before = active(supernet)
    supernet.merge_stages(2)
    supernet.order("magnitude")
    assert supernet.merged_stages == 2
    assert distance(active(supernet), before) < 1e-6
    merged = active(supernet, supernet.space.min)
    supernet.merge_stages(0)
    assert distance(active(supernet, supernet.space.min), merged) < 1e-12


def test_order_makes_small_subnets_of_a_model_with_unimportant_units_better():
    """What it is for: where half of the units do nothing, the half-sized subnet loses nothing."""
    model = make("llama", "ForCausalLM", dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    for block in model.model.layers:
        idle = torch.randperm(40, generator=generator)[:16]
        block.mlp.down_proj.weight.data[:, idle] = 0
        block.mlp.up_proj.weight.data[idle] *= 0.1
        block.mlp.gate_proj.weight.data[idle] *= 0.1
    supernet = SuperTransformer(model, space_of("llama"), rank=2)
    whole = active(supernet)
    narrow = Subnet(48, 6, 24, (0, 1, 2, 3))
    assert distance(active(supernet, narrow), whole) > 0.1
    supernet.order("magnitude")
    assert distance(active(supernet, narrow), whole) < 1e-6


@every_family
def test_a_run_that_was_ordered_is_restored_on_a_fresh_base(name, suffix, tmp_path):
    supernet = elastic(name, suffix)
    supernet.order("activation", batches(suffix))
    supernet.order("magnitude")
    supernet.save_pretrained(tmp_path)
    twin = SuperTransformer.from_pretrained(tmp_path, model=make(name, suffix)).eval()
    assert twin.permutation == supernet.permutation
    for subnet in subnets_of(name).values():
        assert torch.equal(active(twin, subnet), active(supernet, subnet))


@pytest.mark.parametrize(
    "permutation",
    [
        {("hidden", None): list(range(47))},
        {("hidden", None): [0, *range(47)]},
        {("hidden", 0): list(range(48))},
        {("heads", None): list(range(3))},
        {("heads", 0): list(range(6))},  # of groups: there are 3
        {("heads", 4): list(range(3))},
        {("ffn", 0): [39.5, *range(39)]},
        {("depth", 0): [0]},
    ],
)
def test_a_permutation_of_another_model_is_refused_and_nothing_moves(permutation):
    supernet = elastic("llama", "ForCausalLM")
    before = active(supernet)
    with pytest.raises(MLFSError, match="is not one of this model's"):
        supernet.apply_permutation(permutation)
    assert torch.equal(active(supernet), before) and supernet.permutation == {}


def test_padding_and_vocabulary_stay_where_they_are():
    """Only heads, units and the residual stream move: token 1 is still the padding, and logits keep their places."""
    supernet = elastic("roberta", "ForMaskedLM")
    before = supernet.get_input_embeddings().weight.detach().clone()
    supernet.order("magnitude")
    after = supernet.get_input_embeddings().weight
    order = supernet.permutation["hidden", None]
    assert torch.equal(after, before[:, order]) and after.shape[0] == VOCABULARY
    assert supernet.get_input_embeddings().padding_idx == PAD
    assert not math.isnan(active(supernet).sum().item())
