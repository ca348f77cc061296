"""JSON and YAML that people write: read as they mean it, or refused in one line, quickly, whatever it is."""

import json

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from mlfs.errors import MLFSError
from mlfs.parsing import MAX_DEPTH, parse_json, parse_yaml

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=20,
)
BOMB = "a: &a [x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 8)}]\n" for before, name in zip("abcdefg", "bcdefgh", strict=True)
)


@given(VALUES)
def test_what_was_written_is_read(value):
    assert parse_json(json.dumps(value), "x") == value
    assert parse_json(json.dumps(value).encode(), "x") == value
    text = yaml.safe_dump(value)
    assert parse_yaml(text, "x") == yaml.safe_load(text)


@pytest.mark.parametrize("text", ["", "[1, 2", "{'a': 1}", "nothing", b"\xff\xfe", "9" * 5000])
def test_what_is_no_json_is_named_with_what_was_expected(text):
    with pytest.raises(MLFSError, match=r"^--space is not JSON \(.*\): expected a list$") as error:
        parse_json(text, "--space", "a list")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"a: caf\xe9\n", "is not text in UTF-8: .* at byte 6"),
        ("a: 1".encode("utf-16"), "is not text in UTF-8"),
        ("a: [1", "is not YAML"),
        ("a: 1\n---\nb: 2", "is not YAML: expected a single document"),
        ("a: 2026-02-30", "is not YAML: day is out of range"),
        ("a: " + "9" * 5000, "is not YAML"),
        ("a: \0", "is not YAML"),
        ("[1, 2]: 3", "is not YAML"),
        ("a: !!python/object/apply:os.system [ls]", "is not YAML: could not determine a constructor"),
        ("a: &a [*a]", f"nested more than {MAX_DEPTH} deep, or within itself"),
        ("a: &a {b: *a}", "within itself"),
        (BOMB, "has more than 1,000,000 values"),
        ("a: 1\nb: 2\na: 1", "gives 'a' twice"),
        ("x:\n  - {b: 1, b: 2}", "gives 'b' twice"),
    ],
)
def test_yaml_that_is_damaged_ambiguous_or_an_attack_is_refused_in_one_line(text, message):
    with pytest.raises(MLFSError, match=f"^run.yaml.*{message}") as error:
        parse_yaml(text, "run.yaml")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("count", [MAX_DEPTH + 1, 1000, 100_000])
def test_deep_nesting_is_refused_and_crashes_nothing(count):
    for text in ("[" * count + "]" * count, "[" * count, '{"a":' * count + "1" + "}" * count):
        for parse in (parse_json, parse_yaml):
            with pytest.raises(MLFSError, match=r"^x is (nested more than 50 deep|not)"):
                parse(text, "x")


def test_the_deepest_that_is_allowed_is_read():
    text = "[" * MAX_DEPTH + "]" * MAX_DEPTH
    assert parse_json(text, "x") == parse_yaml(text, "x")


@pytest.mark.parametrize("text", ['{"a": 1, "a": 1}', '[{"b": {"a": 1, "a": 2}}]'])
def test_a_name_given_twice_in_json_is_refused(text):
    with pytest.raises(MLFSError, match="x gives 'a' twice: keep one"):
        parse_json(text, "x")


def test_a_mapping_that_takes_in_another_is_read_as_yaml_says():
    assert parse_yaml("base: &b {x: 1, y: 2}\nmore: {<<: *b, y: 3}", "x")["more"] == {"x": 1, "y": 3}
