"""Training and validation data are prepared alike: the same checks, the same label ids, fixed samples."""

from mlfs.data.raw import load_raw
from tests.helpers.data import one_line_error, prepared


def test_validation_is_checked_as_training_is(load):
    train = {"text": ["a", "b"], "label": ["yes", "no"]}
    odd = {"text": ["a", "b"], "label": ["Yes", "maybe"]}
    one_line_error(lambda: prepared(train, odd), "validation data", "'Yes', 'maybe'", "expected 'no', 'yes'")
    one_line_error(lambda: prepared(train, {"text": ["a"], "y": ["no"]}), "no column 'label' in the validation data")
    one_line_error(lambda: prepared(train, {"text": [None], "label": ["no"]}), "row 1 of the validation data")
    csv_train = "text,label\na,0\nb,1\n"
    one_line_error(
        lambda: load("d.csv", csv_train, "text,label\na,\n"), "row 1 of the validation data", "d.csv", "no 'label'"
    )
    one_line_error(
        lambda: load("d.csv", csv_train, "text,label\n,1\n"), "row 1 of the validation data", "d.csv", "no 'text'"
    )
    assert prepared(train, {"text": ["a"], "label": ["no"]}).validation["labels"][:] == [0]


def test_names_of_a_trained_model_fix_the_ids(load):
    names = {0: "no", 1: "perhaps", 2: "yes"}
    path = load.write("v.csv", "text,label\na,yes\nb,no\n")
    raw = load_raw(load.args(validation_file=path), id2label=names)
    assert raw.train is None and raw.validation["labels"][:] == [2, 0] and raw.id2label == names
    other = load.write("v.csv", "text,label\na,never\n")
    one_line_error(
        lambda: load_raw(load.args(validation_file=other), id2label=names), "'never'", "expected 'no', 'perhaps', 'yes'"
    )


def test_samples_are_fixed_nested_and_in_order():
    columns = {"text": [f"t{i:03}" for i in range(100)], "label": [i % 2 for i in range(100)]}
    small, again, large = (prepared(columns, max_train_samples=n).train["text"][:] for n in (10, 10, 30))
    assert len(small) == 10 and small == again and set(small) < set(large) and large == sorted(large)
    raw = prepared(columns, columns, max_eval_samples=7)
    assert len(raw.train) == 100 and len(raw.validation) == 7
    held = prepared(columns, validation_fraction=0.2)
    assert len(held.validation) == 20 and not set(held.train["text"]) & set(held.validation["text"])
