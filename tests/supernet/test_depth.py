"""Depths by number: which layers they keep is measured, recorded, and the same wherever the run goes."""

import copy
import pickle

import pytest
import torch
from torch import nn

from mlfs import MLFSError, SearchSpace, Subnet, SuperTransformer
from mlfs.supernet.depth import BATCHES, DepthSearch
from tests.helpers.calibration import active, batches
from tests.helpers.runs import load
from tests.supernets import FFN, HIDDEN, elastic, perturb
from tests.tiny_models import CASES, inputs, logits_of, make

DEPTHS = SearchSpace(HIDDEN, (6, 4, 2), FFN, (4, 3, 2, 1))
FIRST = [(name, case.classes[0]) for name, case in CASES.items()]
LAYERS = ("layers", None)


def counted(name: str = "bert", suffix: str = "ForSequenceClassification", **options: bool) -> SuperTransformer:
    torch.manual_seed(1)
    space = SearchSpace(HIDDEN, CASES[name].heads, FFN, (4, 3, 2, 1), **options)
    return perturb(SuperTransformer(make(name, suffix), space, rank=4, alpha=8.0)).eval()


def without_effect(supernet: SuperTransformer, layer: int) -> None:
    """Makes a layer hand on what it gets, nearly."""
    for module in supernet.layers[layer].modules():
        if hasattr(module, "own_weight") and module.own_weight.dim() == 2:
            for parameter in module.parameters():
                parameter.data *= 1e-3


# ---- how layers are ranked ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["loss", "influence"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox"])  # whose norms come before: such a layer does nothing
def test_layers_that_do_nothing_go_first(name, method):
    suffix = CASES[name].classes[0]
    for idle in ((0,), (2,), (3, 1)):
        supernet = counted(name, suffix)
        for layer in idle:
            without_effect(supernet, layer)
        # without labels: against those of a batch, random weights are better without any of their layers
        ranking = supernet.rank_layers(method, [inputs(), inputs("left", 1)])
        assert sorted(ranking) == [0, 1, 2, 3]
        assert set(ranking[-len(idle) :]) == set(idle)


def test_influence_is_one_minus_the_cosine_of_what_goes_in_and_comes_out():
    supernet, batch = counted(), batches("ForSequenceClassification")[0]
    with torch.no_grad():
        states = supernet.model(**batch, output_hidden_states=True).hidden_states
    masks = [batch["attention_mask"]]
    search = DepthSearch(supernet.layers, lambda i, kept: supernet.model(**batch).loss, masks)
    found = search.measure(range(4)).influence
    counts = batch["attention_mask"].bool()
    for layer in range(4):
        before, after = (states[layer + step].double() for step in (0, 1))
        cosine = (before * after).sum(-1) / before.norm(dim=-1) / after.norm(dim=-1)
        assert found[layer] == pytest.approx(float((1 - cosine)[counts].mean()), rel=1e-6)


def test_by_loss_each_step_takes_out_the_layer_that_is_missed_least():
    supernet, data = counted("llama", "ForCausalLM"), batches("ForCausalLM", 3)

    def loss(kept: list[int]) -> float:
        sizes = supernet.dimensions.layer_sizes(Subnet(48, 6, 40, tuple(kept)))
        with torch.no_grad(), supernet.activate_sizes(sizes):
            return sum(float(supernet(**batch).loss) for batch in data)

    kept, out = [0, 1, 2, 3], []
    while len(kept) > 1:
        worst = min(kept, key=lambda layer: loss([other for other in kept if other != layer]))
        kept.remove(worst)
        out.append(worst)
    assert supernet.rank_layers("loss", data) == kept + out[::-1]


def test_ranking_stops_at_the_shallowest_depth_and_uses_the_first_batches():
    asked = []

    def run(i: int, kept: tuple[int, ...]) -> torch.Tensor:
        asked.append((i, kept))
        layers_run = [layers[layer] for layer in kept]
        x = torch.ones(1, 1, 2)
        for layer in layers_run:
            x = layer(x)
        return x.sum()

    layers = nn.ModuleList(nn.Linear(2, 2) for _ in range(6))
    ranking = DepthSearch(layers, run, [None, None]).ranking("influence", least=4)
    assert sorted(ranking) == list(range(6)) and ranking[:4] == sorted(ranking[:4])
    assert {len(kept) for _, kept in asked} == {6, 5, 4} and len(asked) == 2 * 3
    supernet, seen = counted(), []
    many = {"input_ids": torch.full((1100, 1), 5), "labels": torch.zeros(1100, dtype=torch.long)}
    supernet.model.register_forward_pre_hook(lambda *_: seen.append(1))
    supernet.rank_layers("influence", batches("ForSequenceClassification", BATCHES + 3))
    assert len(seen) == 4 * BATCHES  # with 4, 3, 2 layers and one
    seen.clear()
    supernet.rank_layers("influence", [many] * BATCHES)
    assert len(seen) == 4 * 2


@pytest.mark.parametrize(("name", "suffix"), FIRST)
def test_every_family_is_ranked_with_and_without_labels_and_left_as_it_was(name, suffix):
    supernet = counted(name, suffix)
    before, whole = copy.deepcopy(supernet.state_dict()), active(supernet)
    rankings = [supernet.rank_layers(method, data) for method in ("loss", "influence") for data in (
        batches(suffix), [inputs(), inputs("left", 1)])]  # fmt: skip
    assert all(sorted(ranking) == [0, 1, 2, 3] for ranking in rankings)
    after = supernet.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert torch.equal(active(supernet), whole) and not any(p.grad is not None for p in supernet.parameters())


def test_bad_calls_are_refused():
    supernet = counted()
    with pytest.raises(MLFSError, match="no batch to rank the layers on: the calibration data is empty"):
        supernet.rank_layers("loss", [])
    with pytest.raises(MLFSError, match="method='best' ranks no layers: expected 'loss' or 'influence'"):
        supernet.rank_layers("best", batches("ForSequenceClassification"))
    for wrong in ([0, 1, 2], [0, 1, 2, 2], [0, 1, 2, 4]):
        with pytest.raises(MLFSError, match=r"the permutation of layers \(layer None\) is not one of this model's"):
            supernet.apply_permutation({LAYERS: wrong})


# ---- which layers a depth keeps -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "suffix"), FIRST)
def test_a_depth_runs_the_first_layers_of_the_ranking(name, suffix):
    supernet, named = counted(name, suffix), elastic(name, suffix, per_layer=False)
    subnet, chosen = Subnet(32, 4, 24, 2), (1, 3)
    if 4 not in CASES[name].heads:
        subnet = Subnet(32, CASES[name].heads[1], 24, 2)
    assert supernet.kept_layers(subnet) == (0, 2)  # evenly spaced, while nothing is known
    supernet.apply_permutation({LAYERS: [3, 1, 0, 2]})
    assert [supernet.kept_layers(Subnet(48, 6, 40, depth)) for depth in (4, 3, 2, 1)] == [
        (0, 1, 2, 3), (0, 1, 3), (1, 3), (3,),
    ]  # fmt: skip
    same = Subnet(subnet.hidden, subnet.heads, subnet.ffn, chosen)
    assert torch.equal(active(supernet, subnet), active(named, same))
    assert torch.equal(active(supernet, same), active(named, same))  # named, where they are the chosen ones
    assert supernet.count_parameters(subnet) == named.count_parameters(same)
    with torch.no_grad():
        assert torch.equal(
            logits_of(supernet.extract(subnet)(**inputs("left"))), logits_of(named.extract(same)(**inputs("left")))
        )
    rows = [subnet, supernet.space.max, same]
    with torch.no_grad(), supernet.activate_rows(rows), named.activate_rows([same, named.space.max, same]):
        assert torch.equal(logits_of(supernet(**inputs("left"))), logits_of(named(**inputs("left"))))


def test_a_size_given_before_means_the_chosen_layers_after():
    supernet = counted()
    subnet = DEPTHS.min
    bound = supernet.bound(subnet)
    before = bound(**inputs()).logits
    supernet.apply_permutation({LAYERS: [2, 0, 1, 3]})
    after = bound(**inputs()).logits
    assert supernet.kept_layers(subnet) == (2,) and not torch.equal(before, after)
    assert torch.equal(after, logits_of(supernet.bound(Subnet(16, 2, 16, (2,)))(**inputs())))


def test_sizes_per_layer_go_to_the_chosen_layers_in_their_order():
    supernet = counted(per_layer=True)
    supernet.apply_permutation({LAYERS: [3, 1, 0, 2]})
    sizes = supernet.layer_sizes(Subnet(48, (6, 4), (24, 16), 2))
    assert sizes.of_layer["heads"] == (0, 6, 0, 4) and sizes.of_layer["ffn"] == (0, 24, 0, 16)


def test_layers_that_are_not_the_chosen_ones_are_refused():
    supernet = counted()
    with pytest.raises(MLFSError, match=r"layers=\(1, 3\) is not one of \(4, 3, 2, 1\)"):
        supernet.bound(Subnet(32, 4, 24, (1, 3)))
    with pytest.raises(MLFSError, match=r"layers=5 is not one of \(4, 3, 2, 1\)"):
        supernet.bound(Subnet(32, 4, 24, 5))


def test_a_number_finds_the_only_named_choice_of_so_many():
    supernet = elastic("bert", "ForSequenceClassification", per_layer=False)  # keeps (0, 2, 3) or (1, 3)
    assert supernet.kept_layers(Subnet(48, 6, 40, 2)) == (1, 3)
    several = SearchSpace(48, 6, 40, ((0, 1, 2, 3), (0, 1), (2, 3)))
    twice = SuperTransformer(make("bert", "ForSequenceClassification"), several)
    with pytest.raises(MLFSError, match="layers=2 is not one of"):
        twice.kept_layers(Subnet(48, 6, 40, 2))


# ---- order, and what carries it -----------------------------------------------------------------------------------


def test_order_ranks_the_layers_too_unless_they_are_named_or_even():
    data = batches("ForSequenceClassification")
    supernet, even, unmeasured, left_open = (counted() for _ in range(4))
    supernet.order("gradient", data, layers="loss")
    left_open.order("gradient", data)
    assert supernet.permutation[LAYERS] == counted().rank_layers("loss", data)
    even.order("gradient", data, layers="even")
    unmeasured.order("magnitude")
    named = elastic("bert", "ForSequenceClassification")
    named.order("gradient", data)
    assert all(LAYERS not in each.permutation for each in (even, unmeasured, left_open, named))
    supernet.order("activation", data, layers="influence")
    assert supernet.permutation[LAYERS] == counted().rank_layers("influence", data)


def test_left_open_layers_are_ranked_by_loss_where_text_is_generated():
    data, supernet = batches("ForCausalLM"), counted("llama", "ForCausalLM")
    supernet.order("activation", data)
    assert supernet.permutation[LAYERS] == counted("llama", "ForCausalLM").rank_layers("loss", data)
    for method in ("even", "auto"):
        with pytest.raises(MLFSError, match=f"method='{method}' ranks no layers"):
            supernet.rank_layers(method, data)


def test_the_ranking_goes_wherever_the_run_goes(tmp_path):
    supernet = counted()
    supernet.apply_permutation({LAYERS: [3, 1, 2, 0]})
    small = Subnet(32, 4, 24, 2)
    expected = active(supernet, small)
    supernet.save_pretrained(tmp_path / "run")
    loaded = load(tmp_path / "run")
    restored = counted()
    restored.apply_permutation({LAYERS: [0, 1, 2, 3], ("hidden", None): list(range(48))[::-1]})
    restored.restore(tmp_path / "run")
    state_loaded = counted()
    state_loaded.kept_layers(small)  # remembered, and no longer right
    state_loaded.load_state_dict(supernet.state_dict())
    pickled = pickle.loads(pickle.dumps(supernet))
    for twin in (loaded, restored, state_loaded, pickled, copy.deepcopy(supernet)):
        assert twin.permutation == supernet.permutation == {LAYERS: [3, 1, 2, 0]}
        assert twin.kept_layers(small) == (1, 3) and torch.equal(active(twin, small), expected)
    fresh = counted()
    fresh.load_state_dict(state_loaded.state_dict())
    fresh.load_state_dict(counted().state_dict())
    assert fresh.permutation == {} and fresh.kept_layers(small) == (0, 2)


def test_a_ranking_in_the_models_own_order_is_not_none():
    supernet, twin = counted(), counted()
    supernet.apply_permutation({LAYERS: [0, 1, 2, 3]})
    twin.load_state_dict(supernet.state_dict())
    assert twin.kept_layers(Subnet(48, 6, 40, 2)) == (0, 1)


def test_a_state_written_over_is_seen_by_the_next_block():
    supernet, twin = counted(), counted()
    supernet.apply_permutation({LAYERS: [3, 1, 2, 0]})
    small = Subnet(32, 4, 24, 2)
    active(twin, small)
    state = supernet.state_dict()
    for key, own in twin.state_dict(keep_vars=True).items():
        own.data.copy_(state[key])
    assert torch.equal(active(twin, small), active(supernet, small))
