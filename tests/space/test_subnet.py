"""`Subnet`: what it accepts and refuses, and that it survives JSON and pickle."""

import dataclasses
import json
import pickle

import pytest
from hypothesis import given

from mlfs import MLFSError, Subnet
from tests.helpers.values import SPACE, subnets


@given(subnets())
def test_subnet_survives_json(subnet):
    again = Subnet.from_json(subnet.to_json())
    assert again == subnet
    assert hash(again) == hash(subnet)
    assert json.loads(subnet.to_json()) == subnet.to_dict()


@given(subnets())
def test_subnet_survives_pickle(subnet):
    assert pickle.loads(pickle.dumps(subnet)) == subnet


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
        (dict(layers=()), r"layers=\(\): expected a number of layers, or ascending, unique indices of at least one"),
        (dict(layers=(2, 0)), r"layers=\(2, 0\): expected a number of layers, or ascending, unique"),
        (dict(layers=(1, 1)), r"layers=\(1, 1\): expected a number of layers, or ascending, unique"),
        (dict(layers=(-1, 1)), r"layers=\(-1, 1\): expected a number of layers, or ascending, unique"),
        (dict(layers=(0.0, 1)), r"layers=\(0\.0, 1\): expected a number of layers, or ascending, unique"),
        (dict(layers=0), "layers=0: expected a positive number of layers, or their indices"),
        (dict(layers=-2), "layers=-2: expected a positive number of layers, or their indices"),
        (dict(layers=True), "layers=True: expected a number of layers"),
        (dict(layers=2.0), "layers=2.0: expected a number of layers"),
    ],
)
def test_bad_subnet_is_refused(arguments, message):
    with pytest.raises(MLFSError, match=message) as raised:
        Subnet(**{"hidden": 48, "heads": 6, "ffn": 40, "layers": (0, 1), **arguments})
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "the subnet '{' is not JSON .*expected e.g. {"),
        ("[1]", "a subnet needs exactly the keys"),
        ('{"hidden": 8, "heads": 4, "ffn": 16}', "a subnet needs exactly the keys"),
        ('{"hidden": 8, "heads": 4, "ffn": 16, "layers": [0], "depth": 1}', "a subnet needs exactly the keys"),
        ('{"hidden": 8, "heads": 4, "ffn": 16, "layers": "2"}', "layers='2': expected a number of layers, or a list"),
        ('{"hidden": 8, "heads": 4, "ffn": 16, "layers": ["a"]}', "layers=.*ascending, unique"),
        ('{"hidden": 8, "heads": {}, "ffn": 16, "layers": [0]}', "heads={}: expected a positive integer"),
        ('{"hidden": [8], "heads": 4, "ffn": 16, "layers": [0]}', "hidden=.*expected a positive integer"),
    ],
)
def test_bad_json_is_refused(text, message):
    with pytest.raises(MLFSError, match=message) as raised:
        Subnet.from_json(text)
    assert "\n" not in str(raised.value)
