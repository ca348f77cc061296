"""`SearchSpace`: what it accepts and refuses, its members, and how they are drawn."""

import itertools
import json
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mlfs import MLFSError, SearchSpace, Subnet
from mlfs.space.search_space import evenly_spaced
from tests.helpers.values import SPACE, spaces


@given(spaces())
def test_space_survives_json(space):
    assert SearchSpace.from_dict(json.loads(json.dumps(space.to_dict()))) == space


def test_lists_and_ranges_are_taken_for_tuples():
    assert Subnet(8, [4, 2], [16, 8], [0, 2]) == Subnet(8, (4, 2), (16, 8), (0, 2))
    assert hash(Subnet(8, [4, 2], 16, range(2))) == hash(Subnet(8, (4, 2), 16, (0, 1)))
    assert SearchSpace([48, 24], [6], [40], [range(3), [0, 2]]).min == Subnet(24, 6, 40, (0, 2))


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
        (dict(layers=()), r"layers=\(\): expected numbers of layers, or tuples of layer indices"),
        (dict(layers=((0, 1), (0, 1))), "expected each choice of kept layers once"),
        (dict(layers=((0, 1), (1, 0))), r"layers=\(1, 0\): expected a number of layers, or ascending, unique"),
        (dict(layers=((0, 1), ())), r"layers=\(\(0, 1\), \(\)\): expected numbers of layers, or tuples"),
        (dict(layers=(([0],),)), r"layers=\(\(\[0\],\),\): expected numbers of layers, or tuples"),
        (dict(layers=(2, (0,))), r"layers=\(2, \(0,\)\): expected numbers of layers, or tuples"),
        (dict(layers=((0, 1), (1, 2))), r"layers: \(1, 2\) keeps layers that the first choice \(0, 1\) does not have"),
        (dict(layers=((0, 1, 2), (0,), (0, 1))), "expected the deepest choice first"),
        (dict(layers=(1, 2)), r"layers=\(1, 2\): expected unique sizes in descending order"),
        (dict(layers=(2, 0)), r"layers=\(2, 0\): expected positive integers"),
        (dict(layers=4), "layers=4: expected numbers of layers"),
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
        ({"hidden": [48], "heads": [6], "ffn": [40], "layers": [2, [0]]}, "expected numbers of layers, or tuples"),
        ({"hidden": [48], "heads": [6], "ffn": [40], "layers": [2, 3]}, "expected unique sizes in descending order"),
        ({"hidden": [48], "heads": [6], "ffn": [40], "layers": 2}, "layers=2: expected"),
        ({"hidden": None, "heads": [6], "ffn": [40], "layers": [2]}, "hidden=None: expected positive integers"),
    ],
)
def test_bad_space_dictionary_is_refused(value, message):
    with pytest.raises(MLFSError, match=message):
        SearchSpace.from_dict(value)


def test_depths_by_number_stay_numbers():
    value = {"hidden": [48], "heads": [6], "ffn": [40], "layers": [6, 3]}
    space = SearchSpace.from_dict(value)
    assert space.layers == (6, 3) and space.counts_layers
    assert space.to_dict() == value | {"per_layer": False}
    assert SearchSpace.from_dict(space.to_dict()) == space
    assert [subnet.layers for subnet in space.uniform()] == [6, 3]
    assert (space.max.depth, space.min.depth) == (6, 3)
    drawn = space.with_per_layer().sample(torch.Generator().manual_seed(0))
    assert drawn in space and len(drawn.per_layer("ffn")) == drawn.depth


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
