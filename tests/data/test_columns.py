"""Which columns are text and label, and what the labels mean."""

import math

import pytest
from datasets import ClassLabel, Dataset, Features, Value
from hypothesis import given, settings
from hypothesis import strategies as st

from mlfs.data.arguments import DataArguments
from mlfs.data.raw import prepare
from tests.helpers.data import one_line_error, prepared


@pytest.mark.parametrize(
    ("columns", "texts", "label"),
    [
        ({"sentence": ["a", "b"], "label": [0, 1]}, ("sentence",), "label"),
        ({"Label": ["x", "y"], "body": ["a", "b"]}, ("body",), "Label"),
        ({"id": ["i", "j"], "first": ["a", "b"], "then": ["c", "d"], "target": [0, 1]}, ("first", "then"), "target"),
        ({"note": ["a", "b"], "sentence2": ["c", "d"], "sentence1": ["e", "f"], "label": [0, 1]},
         ("sentence1", "sentence2"), "label"),
        ({"title": ["a", "b"], "author": ["c", "d"], "text": ["e", "f"], "label": [0, 1], "score": [1, 2]},
         ("text",), "label"),
        ({"year": ["1999", "2001"], "text": ["a", "b"], "class": ["x", "y"]}, ("text",), "class"),
    ],
)  # fmt: skip
def test_columns_are_guessed_by_the_documented_rule(columns, texts, label):
    raw = prepared(columns)
    assert raw.text_columns == texts and raw.train.column_names == [*texts, "labels"]
    assert [raw.id2label[i] for i in raw.train["labels"]] == [str(value) for value in columns[label]]


def test_arguments_override_the_guess():
    columns = {"a": ["a", "b"], "b": ["c", "d"], "label": [0, 1], "y": ["p", "q"]}
    raw = prepared(columns, text_column="b", label_column="y")
    assert raw.text_columns == ("b",) and raw.id2label == {0: "p", 1: "q"}
    assert prepared(columns, text_column="b", text_pair_column="a").text_columns == ("b", "a")
    assert prepared({**columns, "text": ["e", "f"]}, task="causal-lm").text_columns == ("text",)


@pytest.mark.parametrize(
    ("columns", "options", "parts"),
    [
        ({"text": ["a"], "label": [0]}, {"text_column": "body"}, ["no column 'body'", "'text', 'label'"]),
        ({"text": ["a"], "label": [0]}, {"label_column": "y"}, ["no column 'y'", "'text', 'label'"]),
        ({"a": ["a"], "b": ["b"], "c": ["c"], "label": [0]}, {}, ["several columns", "'a', 'b', 'c'", "--text_column"]),
        ({"n": [1], "label": [0]}, {}, ["no column holds text", "'n', 'label'"]),
        ({"text": ["a"], "score": [0], "class": [1]}, {}, ["class or score", "--label_column"]),
        ({"text": ["a"], "lable": [0]}, {}, ["no label column", "'text', 'lable'", "or --task causal-lm"]),
        ({"text": ["a"]}, {"task": "classification"}, ["no label column", "give --label_column"]),
        ({"n": [1], "label": [0]}, {"text_column": "n"}, ["is not text"]),
        ({"text": ["a"], "label": [0]}, {"text_pair_column": "text"}, ["give both"]),
        ({"a": ["a"], "b": ["b"]}, {"task": "causal-lm", "text_column": "a", "text_pair_column": "b"}, ["reads one"]),
        ({"text": ["a", None], "label": [0, 1]}, {}, ["row 2 of the train data has no 'text'"]),
        ({"text": ["a", "b"], "label": ["x", None]}, {}, ["row 2 of the train data has no 'label'"]),
        ({"text": ["a", "b"], "label": ["x", " "]}, {}, ["row 2 of the train data has no 'label'"]),
        ({"text": ["a", "b"], "label": [0.5, math.nan]}, {}, ["row 2 of the train data has no 'label'"]),
        ({"text": ["a", "b"], "label": [1, 1]}, {}, ["the one label '1'", "two or more"]),
        ({"text": ["a", "b"], "label": [[1], [2]]}, {}, ["is no label"]),
        ({"text": ["a", "b"], "label": ["1.5", "high"]}, {"task": "regression"}, ["row 2", "'high'", "needs numbers"]),
        ({"text": ["a", "b"], "label": [0, 1]}, {"validation_fraction": 0.9}, ["leaves none to train on"]),
    ],
)  # fmt: skip
def test_columns_that_do_not_do_are_one_line_errors(columns, options, parts):
    one_line_error(lambda: prepared(columns, **options), *parts)


@settings(deadline=None, max_examples=60)
@given(st.one_of(st.lists(st.integers(-99, 99)), st.lists(st.text(st.characters(codec="utf-8"), min_size=1))))
def test_label_map_is_a_bijection_in_sorted_order_that_gives_every_label_back(values):
    values = [v.strip() if isinstance(v, str) else v for v in values]
    values = [v for v in values if v != ""]
    values += [1, 2] if all(isinstance(v, int) for v in values) else ["one", "two"]
    raw = prepared({"text": ["t"] * len(values), "label": values}, {"text": ["t"], "label": values[-1:]})
    assert raw.task == "classification" and raw.num_labels == len(raw.id2label) == len(raw.label2id)
    assert list(raw.id2label) == list(range(raw.num_labels))
    assert [raw.id2label[i] for i in raw.train["labels"]] == [str(value) for value in values]
    assert list(raw.id2label.values()) == [str(value) for value in sorted(set(values))]


def test_numbers_spelled_in_a_file_are_the_numbers(load):
    raw = load("a.csv", "text,label\na,10\nb,9\nc,10\n", "text,label\na,9.0\n")
    assert raw.id2label == {0: "9", 1: "10"} and raw.train["labels"][:] == [1, 0, 1]
    assert raw.validation["labels"][:] == [0]


@pytest.mark.parametrize(
    ("values", "task"),
    [
        ([0, 1, 2], "classification"),
        (list(range(40)), "classification"),
        ([0.0, 1.0, 1.0], "classification"),
        ([0.5, 1.0, 2.0], "regression"),
        ([float(i) for i in range(21)], "regression"),
        ([float(i) for i in range(20)], "classification"),
        ([True, False], "classification"),
        (["0.25", "1.0"], "regression"),
    ],
)
def test_task_is_read_off_the_labels(values, task):
    columns = {"text": ["t"] * len(values), "label": values}
    raw = prepared(columns)
    assert raw.task == task
    forced = prepared(columns, task="regression")
    assert forced.task == "regression" and forced.num_labels == 1 and forced.id2label == {}
    assert forced.train["labels"][:] == [float(value) for value in values]
    assert forced.train.features["labels"] == Value("float32")


def test_class_label_of_a_data_set_keeps_its_names_and_order():
    features = Features({"text": Value("string"), "label": ClassLabel(names=["z", "a"])})
    rows = Dataset.from_dict({"text": ["t", "u"], "label": [0, 1]}, features)
    raw = prepare(rows, None, DataArguments())
    assert raw.id2label == {0: "z", 1: "a"} and raw.train["labels"][:] == [0, 1]


@pytest.mark.parametrize("label", ["1e400", "-1e999", "9" * 400, "9" * 5000, "1e39"])
def test_a_label_that_no_float_can_hold_is_refused(label):
    columns = {"text": ["a", "b"], "label": ["0.5", label]}
    message = one_line_error(lambda: prepared(columns), "row 2 of the train data has the label", "larger than any")
    assert len(message) < 200


def test_a_long_whole_number_that_a_float_holds_is_a_class_as_it_stands():
    raw = prepared({"text": ["a", "b"], "label": ["9" * 30, "1"]})
    assert raw.task == "classification" and set(raw.id2label.values()) == {"9" * 30, "1"}


def test_a_message_names_some_of_very_many_columns():
    columns = {f"column{i}": ["a", "b"] for i in range(500)} | {"label": [0, 1]}
    message = one_line_error(lambda: prepared(columns), "'column29' and 471 more")
    assert len(message) < 1000


@pytest.mark.parametrize("numbers", [["1", "-2.5"], ["1e5", "٣"], [None, ".5"], ["", "7"]])
def test_a_column_that_spells_numbers_is_no_text(numbers):
    columns = {"note": numbers, "body": ["a", "b"], "label": [0, 1]}
    assert prepared(columns).text_columns == ("body",)


@pytest.mark.parametrize("odd", ["nan", "inf", "n/a", "2,7", "unknown"])
def test_a_measurement_with_a_cell_that_is_no_number_does_not_become_classes(odd):
    columns = {"text": ["a", "b", "c"], "label": ["0.5", odd, "2.25"]}
    one_line_error(lambda: prepared(columns), f"row 2 of the train data has the label {odd!r}", "such as 0.5")
    assert prepared(columns, task="classification").id2label[0] == "0.5"
    one_line_error(lambda: prepared(columns, task="regression"), f"row 2 of the train data has the label {odd!r}")


def test_names_beside_whole_numbers_are_classes():
    assert prepared({"text": ["a", "b"], "label": ["1", "none"]}).id2label == {0: "1", 1: "none"}
