"""The values that say what runs: what they accept, refuse, say, and how they are drawn."""

import dataclasses
import itertools
import json
import pickle
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mlfs import MLFSError, SearchSpace, Subnet, SuperTransformer
from mlfs.space.dimensions import Dimensions
from mlfs.space.search_space import evenly_spaced
from tests.tiny_models import make

SPACE = SearchSpace((48, 32, 16), (6, 4, 2), (40, 24, 16), ((0, 1, 2, 3), (0, 2, 3), (1, 3)))
LLAMA = Dimensions(hidden=48, heads=6, kv_heads=3, head_dim=8, ffn=40, layers=4)

indices = st.sets(st.integers(0, 60), min_size=1, max_size=8).map(lambda s: tuple(sorted(s)))
sizes = st.integers(1, 5000)
descending = st.sets(sizes, min_size=1, max_size=5).map(lambda s: tuple(sorted(s, reverse=True)))


@st.composite
def subnets(draw) -> Subnet:
    layers = draw(indices)
    each = st.one_of(sizes, st.tuples(*[sizes] * len(layers)))
    return Subnet(draw(sizes), draw(each), draw(each), layers)


@st.composite
def spaces(draw) -> SearchSpace:
    full = draw(indices)
    shallower = draw(st.sets(st.sets(st.sampled_from(full), min_size=1).map(lambda s: tuple(sorted(s))), max_size=3))
    layers = (full, *sorted(shallower - {full}, key=len, reverse=True))
    return SearchSpace(draw(descending), draw(descending), draw(descending), layers, draw(st.booleans()))


@given(subnets())
def test_subnet_survives_json(subnet):
    again = Subnet.from_json(subnet.to_json())
    assert again == subnet
    assert hash(again) == hash(subnet)
    assert json.loads(subnet.to_json()) == subnet.to_dict()


@given(subnets())
def test_subnet_survives_pickle(subnet):
    assert pickle.loads(pickle.dumps(subnet)) == subnet


@given(spaces())
def test_space_survives_json(space):
    assert SearchSpace.from_dict(json.loads(json.dumps(space.to_dict()))) == space


@given(subnets())
def test_per_layer_sizes_are_one_per_kept_layer(subnet):
    for axis in ("heads", "ffn"):
        value, spelled = getattr(subnet, axis), subnet.per_layer(axis)
        assert len(spelled) == len(subnet.layers)
        assert spelled == value or set(spelled) == {value}


def test_subnet_cannot_be_changed():
    subnet = SPACE.max
    with pytest.raises(dataclasses.FrozenInstanceError):
        subnet.hidden = 1


def test_equal_sizes_for_every_layer_are_the_same_subnet_as_one_size():
    spelled, short = Subnet(8, (4, 4), (16, 16), (0, 2)), Subnet(8, 4, 16, (0, 2))
    assert spelled == short and hash(spelled) == hash(short) and spelled.is_uniform
    assert not Subnet(8, (4, 2), 16, (0, 2)).is_uniform


def test_lists_and_ranges_are_taken_for_tuples():
    assert Subnet(8, [4, 2], [16, 8], [0, 2]) == Subnet(8, (4, 2), (16, 8), (0, 2))
    assert hash(Subnet(8, [4, 2], 16, range(2))) == hash(Subnet(8, (4, 2), 16, (0, 1)))
    assert SearchSpace([48, 24], [6], [40], [range(3), [0, 2]]).min == Subnet(24, 6, 40, (0, 2))


def test_text_names_the_sizes():
    assert str(Subnet(8, (4, 2), 16, (0, 2))) == "8/(4,2)/16/2"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(hidden=0), "hidden=0: expected a positive integer"),
        (dict(hidden=-4), "hidden=-4: expected a positive integer"),
        (dict(hidden=3.0), r"hidden=3\.0: expected a positive integer"),
        (dict(hidden=True), "hidden=True: expected a positive integer"),
        (dict(hidden="48"), "hidden='48': expected a positive integer"),
        (dict(heads=0), "heads=0: expected a positive integer, or one per kept layer"),
        (dict(heads=(4, 0)), r"heads=\(4, 0\): expected a positive integer, or one per kept layer"),
        (dict(ffn=()), r"ffn=\(\): expected a positive integer, or one per kept layer"),
        (dict(ffn=None), "ffn=None: expected a positive integer, or one per kept layer"),
        (dict(ffn=(1, 2, 3)), "ffn has 3 sizes for 2 kept layers: give one, or one each"),
        (dict(layers=()), r"layers=\(\): expected ascending, unique indices of at least one kept layer"),
        (dict(layers=(2, 0)), r"layers=\(2, 0\): expected ascending, unique"),
        (dict(layers=(1, 1)), r"layers=\(1, 1\): expected ascending, unique"),
        (dict(layers=(-1, 1)), r"layers=\(-1, 1\): expected ascending, unique"),
        (dict(layers=(0.0, 1)), r"layers=\(0\.0, 1\): expected ascending, unique"),
        (dict(layers=2), "layers=2: expected ascending, unique"),
    ],
)
def test_bad_subnet_is_refused(arguments, message):
    with pytest.raises(MLFSError, match=message) as raised:
        Subnet(**{"hidden": 48, "heads": 6, "ffn": 40, "layers": (0, 1), **arguments})
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not a subnet in JSON: '{' .*expected e.g. {"),
        ("[1]", "a subnet needs exactly the keys"),
        ('{"hidden": 8, "heads": 4, "ffn": 16}', "a subnet needs exactly the keys"),
        ('{"hidden": 8, "heads": 4, "ffn": 16, "layers": [0], "depth": 1}', "a subnet needs exactly the keys"),
        ('{"hidden": 8, "heads": 4, "ffn": 16, "layers": 2}', "layers=2: expected a list of kept layer indices"),
        ('{"hidden": 8, "heads": 4, "ffn": 16, "layers": ["a"]}', "layers=.*expected ascending, unique"),
        ('{"hidden": 8, "heads": {}, "ffn": 16, "layers": [0]}', "heads={}: expected a positive integer"),
        ('{"hidden": [8], "heads": 4, "ffn": 16, "layers": [0]}', "hidden=.*expected a positive integer"),
    ],
)
def test_bad_json_is_refused(text, message):
    with pytest.raises(MLFSError, match=message) as raised:
        Subnet.from_json(text)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(hidden=(16, 48)), r"hidden=\(16, 48\): expected unique sizes in descending order, largest first"),
        (dict(heads=(6, 6, 4)), r"heads=\(6, 6, 4\): expected unique sizes in descending order"),
        (dict(ffn=(40, 0)), r"ffn=\(40, 0\): expected positive integers"),
        (dict(ffn=()), r"ffn=\(\): expected positive integers"),
        (dict(ffn=(40, 24.0)), r"ffn=\(40, 24\.0\): expected positive integers"),
        (dict(ffn=None), "ffn=None: expected positive integers"),
        (dict(ffn="40"), "ffn='40': expected positive integers"),
        (dict(layers=()), r"layers=\(\): expected at least one choice of kept layers, each once"),
        (dict(layers=((0, 1), (0, 1))), "expected at least one choice of kept layers, each once"),
        (dict(layers=((0, 1), (1, 0))), r"layers=\(1, 0\): expected ascending, unique"),
        (dict(layers=((0, 1), ())), r"layers=\(\(0, 1\), \(\)\): expected tuples of layer indices"),
        (dict(layers=(([0],),)), r"layers=\(\(\[0\],\),\): expected tuples of layer indices"),
        (dict(layers=((0, 1), (1, 2))), r"layers: \(1, 2\) keeps layers that the first choice \(0, 1\) does not have"),
        (dict(layers=((0, 1, 2), (0,), (0, 1))), "expected the deepest choice first"),
        (dict(layers=(0, 1)), r"layers=\(0, 1\): expected tuples of layer indices"),
        (dict(layers=4), "layers=4: expected at least one choice of kept layers"),
    ],
)
def test_bad_space_is_refused(arguments, message):
    with pytest.raises(MLFSError, match=message) as raised:
        SearchSpace(**{"hidden": (48,), "heads": (6,), "ffn": (40,), "layers": ((0, 1),), **arguments})
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"hidden": [48]}, "a search space needs the keys"),
        ([48], "a search space needs the keys"),
        ({"hidden": [48], "heads": [6], "ffn": [40], "layers": [2], "depth": 3}, "a search space needs the keys"),
        (
            {"hidden": [48], "heads": [6], "ffn": [40], "layers": [2, [0]]},
            "expected lists of layer indices, or all counts",
        ),
        ({"hidden": [48], "heads": [6], "ffn": [40], "layers": [2, 3]}, "cannot keep 3 of 2 layers"),
        ({"hidden": [48], "heads": [6], "ffn": [40], "layers": [2, 0]}, "cannot keep 0 of 2 layers"),
        ({"hidden": [48], "heads": [6], "ffn": [40], "layers": 2}, "layers=2: expected"),
        ({"hidden": None, "heads": [6], "ffn": [40], "layers": [2]}, "hidden=None: expected positive integers"),
    ],
)
def test_bad_space_dictionary_is_refused(value, message):
    with pytest.raises(MLFSError, match=message):
        SearchSpace.from_dict(value)


def test_counts_of_layers_become_evenly_spaced_ones():
    value = {"hidden": [48], "heads": [6], "ffn": [40], "layers": [6, 3]}
    assert SearchSpace.from_dict(value).layers == ((0, 1, 2, 3, 4, 5), (0, 2, 4))


def test_one_size_may_stand_for_an_axis():
    assert SearchSpace(48, 6, 40, ((0, 1),)) == SearchSpace((48,), (6,), (40,), ((0, 1),))


@pytest.mark.parametrize(
    ("subnet", "message"),
    [
        (Subnet(47, 6, 40, (0, 1, 2, 3)), r"hidden=47 is not one of \(48, 32, 16\)"),
        (Subnet(96, 6, 40, (0, 1, 2, 3)), r"hidden=96 is not one of"),
        (Subnet(48, 3, 40, (0, 1, 2, 3)), r"heads=3 is not one of \(6, 4, 2\)"),
        (Subnet(48, (6, 5, 4), 40, (0, 2, 3)), r"heads=5 is not one of \(6, 4, 2\)"),
        (Subnet(48, 6, (40, 41, 16), (0, 2, 3)), r"ffn=41 is not one of \(40, 24, 16\)"),
        (Subnet(48, 6, 40, (0, 1)), r"layers=\(0, 1\) is not one of"),
        (Subnet(48, 6, 40, (0, 1, 2, 3, 4)), r"layers=\(0, 1, 2, 3, 4\) is not one of"),
    ],
)
def test_subnet_outside_the_space_is_named_with_what_there_is(subnet, message):
    assert subnet not in SPACE
    with pytest.raises(MLFSError, match="is outside the space: " + message):
        SPACE.check(subnet)


def test_only_subnets_are_members():
    assert SPACE.max in SPACE and SPACE.min in SPACE
    assert "max" not in SPACE and None not in SPACE


@given(spaces(), st.integers(0, 2**31), st.booleans())
def test_samples_are_members_and_the_generator_decides(space, seed, depths):
    def draw() -> list[Subnet]:
        generator = torch.Generator().manual_seed(seed)
        return [space.sample(generator, depths) for _ in range(5)]

    drawn = draw()
    assert drawn == draw()
    for subnet in drawn:
        space.check(subnet)
        assert depths or subnet.layers == space.layers[0]
        assert space.per_layer or subnet.is_uniform


def test_samples_reach_every_size_about_equally_often():
    generator = torch.Generator().manual_seed(0)
    drawn = [SPACE.sample(generator) for _ in range(3000)]
    for axis in ("hidden", "heads", "ffn", "layers"):
        counts = Counter(getattr(subnet, axis) for subnet in drawn)
        assert set(counts) == set(getattr(SPACE, axis))
        assert all(850 < count < 1150 for count in counts.values()), counts


@given(spaces(), st.integers(0, 2**31), st.booleans())
def test_level_samples_are_members_as_wide_on_every_axis(space, seed, depths):
    subnet = space.sample_level(torch.Generator().manual_seed(seed), depths)
    space.check(subnet)
    assert depths or subnet.layers == space.layers[0]
    ends = [(getattr(space, axis)[0], getattr(space, axis)[-1]) for axis in ("hidden", "heads", "ffn")]
    longest = max(len(space.hidden), len(space.heads), len(space.ffn))
    if longest == 2:  # nothing between: all wide, or all narrow
        assert (subnet.hidden, subnet.heads, subnet.ffn) in list(zip(*ends, strict=True))


def test_level_samples_reach_every_level_and_depth_but_the_full_model_about_equally_often():
    generator = torch.Generator().manual_seed(0)
    drawn = Counter(SPACE.sample_level(generator) for _ in range(3200))
    levels = list(zip(SPACE.hidden, SPACE.heads, SPACE.ffn, strict=True))
    assert set(drawn) == {Subnet(*level, layers) for level in levels for layers in SPACE.layers} - {SPACE.max}
    assert all(320 < count < 480 for count in drawn.values()), drawn
    alone = SearchSpace((48,), (6,), (40,), ((0, 1, 2, 3),))
    assert alone.sample_level() == alone.max


def test_samples_without_a_generator_follow_the_global_seed():
    torch.manual_seed(3)
    first = [SPACE.sample() for _ in range(5)]
    torch.manual_seed(3)
    assert [SPACE.sample() for _ in range(5)] == first


def test_samples_differ_between_layers_where_asked():
    generator = torch.Generator().manual_seed(0)
    drawn = [SPACE.with_per_layer().sample(generator) for _ in range(20)]
    assert any(not subnet.is_uniform for subnet in drawn)
    assert all(subnet in SPACE for subnet in drawn)  # per_layer is about sampling: membership is the same


@given(spaces())
def test_uniform_members_are_each_there_once(space):
    members = list(space.uniform())
    assert len(members) == len(set(members))
    assert len(members) == len(space.hidden) * len(space.heads) * len(space.ffn) * len(space.layers)
    assert members[0] == space.max and members[-1] == space.min
    assert all(member in space for member in members)


@given(spaces())
def test_palette_holds_members_from_max_to_min(space):
    palette = space.palette()
    assert palette["max"] == space.max and palette["min"] == space.min
    assert all(member in space for member in palette.values())
    between = [member for name, member in palette.items() if name not in ("max", "min")]
    assert space.max not in between and space.min not in between


@given(st.integers(1, 80).flatmap(lambda n: st.tuples(st.just(n), st.integers(1, n))))
def test_evenly_spaced_layers_start_at_the_first_and_leave_like_gaps(case):
    layers, kept = case
    chosen = evenly_spaced(layers, kept)
    assert len(chosen) == kept and chosen[0] == 0 and chosen[-1] < layers
    gaps = {b - a for a, b in itertools.pairwise(chosen)}
    assert not gaps or max(gaps) - min(gaps) <= 1


def space(**sizes) -> SearchSpace:
    return SearchSpace(**{"hidden": (48,), "heads": (6,), "ffn": (40,), "layers": ((0, 1, 2, 3),), **sizes})


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        (dict(heads=(6, 3)), "heads=3 is not a whole number of groups: 6 query heads share 3 key-value heads, .* of 2"),
        (
            dict(hidden=(96, 48)),
            "the space's hidden is larger than the model: its first choice is 96, the model has 48",
        ),
        (dict(heads=(8, 6)), "the space's heads is larger than the model: its first choice is 8, the model has 6"),
        (dict(ffn=(80, 40)), "the space's ffn is larger than the model: its first choice is 80, the model has 40"),
        (dict(hidden=(32, 16)), "the space's hidden does not start at the full model: .* 32, the model has 48"),
        (dict(layers=((0, 1, 2, 3, 4),)), "the space's layers does not start at the full model"),
        (dict(layers=((0, 1),)), "the space's layers does not start at the full model"),
    ],
)
def test_space_that_does_not_fit_the_model_is_refused(sizes, message):
    with pytest.raises(MLFSError, match=message):
        LLAMA.check(space(**sizes))
    model = make("llama", "ForCausalLM")
    with pytest.raises(MLFSError, match=message):
        SuperTransformer(model, space(**sizes))
    assert not any(type(module).__module__.startswith("mlfs") for module in model.modules())


def test_one_shared_key_value_head_allows_any_number_of_heads():
    dataclasses.replace(LLAMA, kv_heads=1).check(space(heads=(6, 5, 1)))


@given(
    st.integers(1, 12),
    st.integers(1, 8),
    st.integers(1, 16),
    st.integers(1, 512),
    st.integers(1, 40),
    st.integers(0, 99),
)
def test_default_space_fits_every_model(groups, group, head_dim, ffn, layers, odd):
    heads = groups * group
    for hidden in (heads * head_dim, heads * head_dim + odd):
        dims = Dimensions(hidden, heads, groups, head_dim, ffn, layers)
        default = dims.default_space()
        dims.check(default)
        assert all(member in default for member in default.palette().values())


def test_default_space_of_bert_base():
    dims = Dimensions(hidden=768, heads=12, kv_heads=12, head_dim=64, ffn=3072, layers=12)
    default = dims.default_space()
    assert (default.hidden, default.heads, default.ffn) == ((768, 512, 384), (12, 8, 6), (3072, 1536, 768))
    assert default.layers == (tuple(range(12)), (0, 2, 4, 6, 8, 10))
