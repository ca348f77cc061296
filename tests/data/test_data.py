import csv
import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Value
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import HfArgumentParser, PreTrainedTokenizerFast

from mlfs.data.arguments import DataArguments
from mlfs.data.prepare import RawData, load_raw, prepare
from mlfs.data.tokens import _packer, collator, tokenize
from mlfs.errors import MLFSError

GLUE = Path(__file__).parents[3] / "shared" / "data" / "glue"
needs_glue = pytest.mark.skipif(not GLUE.is_dir(), reason=f"no GLUE data at {GLUE}")


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, [CLS] a [SEP] b [SEP]; small enough to count by hand."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["[PAD]", "[CLS]", "[SEP]", "[EOS]", *letters])}
    inner = Tokenizer(models.BPE(vocabulary, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    names = {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]", "eos_token": "[EOS]"}
    types = ["input_ids", "token_type_ids", "attention_mask"]
    return PreTrainedTokenizerFast(tokenizer_object=inner, model_input_names=types, **names)


class Load:
    """Writes files and loads them, each under a name and with a cache of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.counter = folder, itertools.count()

    def write(self, name: str, content: str | bytes) -> str:
        path = self.folder / str(next(self.counter)) / name
        path.parent.mkdir()
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return str(path)

    def args(self, **options: Any) -> DataArguments:
        return DataArguments(data_cache=str(self.folder / "cache"), **options)

    def __call__(self, name: str, train: str | bytes, validation: str | bytes | None = None, **options: Any) -> RawData:
        options["train_file"] = self.write(name, train)
        if validation is not None:
            options["validation_file"] = self.write(name, validation)
        return load_raw(self.args(**options))


@pytest.fixture
def load(tmp_path: Path) -> Load:
    return Load(tmp_path)


def _one_line(call: Callable[[], Any], *parts: str) -> None:
    with pytest.raises(MLFSError) as error:
        call()
    message = str(error.value)
    assert "\n" not in message
    for part in parts:
        assert part in message, message


# Files ---------------------------------------------------------------------------------------------------------------


@needs_glue
@pytest.mark.parametrize(
    ("task", "texts", "names", "sizes"),
    [
        ("SST-2", ("sentence",), ["0", "1"], (67349, 872)),
        ("MRPC", ("#1 String", "#2 String"), ["0", "1"], (4076, 1725)),
        ("RTE", ("sentence1", "sentence2"), ["entailment", "not_entailment"], (2490, 277)),
    ],
)
def test_glue_files_load_by_their_names_alone(load, task, texts, names, sizes):
    files = {"train_file": str(GLUE / task / "train.tsv"), "validation_file": str(GLUE / task / "dev.tsv")}
    raw = load_raw(load.args(**files))
    assert (raw.task, raw.text_columns, list(raw.id2label.values())) == ("classification", texts, names)
    assert (len(raw.train), len(raw.validation)) == sizes
    with open(files["train_file"], encoding="utf-8", newline="\n") as file:
        header, *rows = [line.rstrip("\n").split("\t") for line in file]
    label = {"SST-2": "label", "MRPC": "Quality", "RTE": "label"}[task]
    for column in texts:
        assert raw.train[column][:] == [row[header.index(column)] for row in rows]
    assert [names[i] for i in raw.train["labels"]] == [row[header.index(label)] for row in rows]


_ROWS = [{"text": "a tale", "label": "good"}, {"text": 'he said "no", twice', "label": "bad"}]


@pytest.mark.parametrize("suffix", ["csv", "tsv", "jsonl", "json", "parquet"])
def test_every_table_format_gives_the_same_data(load, suffix):
    if suffix == "parquet":
        path = load.write("a.parquet", b"")
        pd.DataFrame(_ROWS).to_parquet(path)
        content: str | bytes = Path(path).read_bytes()
    elif suffix == "json":
        content = json.dumps(_ROWS)
    elif suffix == "jsonl":
        content = "\n".join(map(json.dumps, _ROWS))
    elif suffix == "csv":
        content = 'text,label\r\na tale,good\r\n"he said ""no"", twice",bad\r\n'
    else:
        content = '\ufefftext\tlabel\na tale\tgood\nhe said "no", twice\tbad\n'
    raw = load(f"data.{suffix}", content, content)
    assert raw.train["text"][:] == raw.validation["text"][:] == [row["text"] for row in _ROWS]
    assert raw.train["labels"][:] == [1, 0] and raw.id2label == {0: "bad", 1: "good"}
    assert raw.label2id == {"bad": 0, "good": 1} and raw.num_labels == 2


_text = st.text(st.characters(exclude_categories=["Cs", "Cc"], include_characters='\n\t"'), min_size=1, max_size=30)
_rows = st.lists(st.tuples(_text, st.sampled_from(["x", "y"])), min_size=2, max_size=8)
_slow = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@_slow
@given(_rows)
def test_csv_gives_back_any_text_that_was_written(tmp_path_factory, rows):
    load = Load(tmp_path_factory.mktemp("csv"))
    rows = [("first", "x"), ("second", "y"), *rows]
    path = load.write("a.csv", "")
    with open(path, "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("text", "label"), *rows])
    raw = load_raw(load.args(train_file=path))
    assert raw.train["text"][:] == [text for text, _ in rows]
    assert [raw.id2label[i] for i in raw.train["labels"]] == [label for _, label in rows]


@_slow
@given(_rows)
def test_tsv_takes_quotes_as_they_stand(tmp_path_factory, rows):
    load = Load(tmp_path_factory.mktemp("tsv"))
    rows = [("first", "x"), ("second", "y"), *((t.replace("\t", " ").replace("\n", " "), label) for t, label in rows)]
    lines = "".join(f"{text}\t{label}\n" for text, label in [("text", "label"), *rows])
    raw = load("a.tsv", lines)
    assert raw.train["text"][:] == [text for text, _ in rows]


def test_words_that_mean_missing_elsewhere_are_texts(load):
    words = ["NA", "null", "None", "nan", "n/a", "1.50", "007"]
    raw = load(
        "a.csv", "text,label\n" + "".join(f"{word},{i % 2}\n" for i, word in enumerate(words)), text_column="text"
    )
    assert raw.train["text"][:] == words


def test_a_column_keeps_its_type_in_files_longer_than_a_chunk(load):
    rows = [(str(i), i % 2) for i in range(12_000)] + [("word", 1)]
    raw = load("a.csv", "text,label\n" + "".join(f"{t},{y}\n" for t, y in rows), text_column="text")
    assert raw.train["text"][:] == [text for text, _ in rows]


def test_text_lines_whole_files_and_source_folders_are_documents(load, tmp_path):
    assert load("a.txt", "one\n\ntwo\n").train["text"][:] == ["one", "", "two"]
    assert load("a.txt", "one\n\ntwo\n", documents="file").train["text"][:] == ["one\n\ntwo\n"]
    assert load("a.py", "x = 1\ny = 2\n").train["text"][:] == ["x = 1\ny = 2\n"]
    tree = tmp_path / "tree [1]"
    for name, content in {
        "b.py": b"b",
        "sub/a.c": b"a",
        "x.bin": b"?",
        ".git/c.py": b"c",
        "e.py": b"",
        "l.py": b"\xe9",
    }.items():
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_bytes(content)
    raw = load_raw(load.args(train_file=str(tree)))
    assert raw.task == "causal-lm" and raw.num_labels == 0
    assert raw.train["text"][:] == ["b", "\ufffd", "a"]
    (tree / "d.py").write_text("d")
    assert load_raw(load.args(train_file=str(tree / "*.py").replace("[1]", "*"))).train["text"][:] == [
        "b",
        "d",
        "\ufffd",
    ]


def test_a_changed_file_is_read_again(load):
    path = load.write("a.jsonl", '{"text": "old"}')
    assert load_raw(load.args(train_file=path)).train["text"][:] == ["old"]
    Path(path).write_text('{"text": "new"}')
    assert load_raw(load.args(train_file=path)).train["text"][:] == ["new"]


def test_several_tables_of_one_header_are_read_in_order_of_their_names(load, tmp_path):
    for name, row in (("b", "two,1"), ("a", "one,0")):
        (tmp_path / f"part-{name}.csv").write_text(f"text,label\n{row}\n")
    pattern = str(tmp_path / "part-*.csv")
    assert load_raw(load.args(train_file=pattern)).train["text"][:] == ["one", "two"]
    (tmp_path / "part-c.csv").write_text("label,text\n1,three\n")
    _one_line(lambda: load_raw(load.args(train_file=pattern)), "part-c.csv differs from that of part-a.csv")
    (tmp_path / "part-d.tsv").write_text("label\ttext\n1\tthree\n")
    _one_line(lambda: load_raw(load.args(train_file=str(tmp_path / "part-*"))), "several kinds (csv, tsv)")


@pytest.mark.parametrize(
    ("name", "content", "part"),
    [
        ("a.csv", "", "is empty"),
        ("a.csv", "text,label\n", "has no rows"),
        ("a.csv", "text,label\na,0\nb,1,2\n", "Expected 2 fields in line 3, saw 3"),
        ("a.csv", "text,label\na,0,5\nb,1,2\n", "Expected 2 fields in line 2, saw 3"),
        ("a.csv", 'text,label\n"a,0\n', "EOF inside string"),
        ("a.csv", b"text,label\na\xff,0\n", "codec can't decode"),
        ("a.csv", "text,text\na,0\n", "names 'text' more than once"),
        ("a.jsonl", '{"text": "a", "label": 0}\n{"text"', "cannot be read"),
        ("a.parquet", "PAR1 not really", "cannot be read"),
        ("a.txt", b"caf\xe9\n", "codec can't decode"),
        ("a.xlsx", "PK", "unknown extension '.xlsx'"),
        ("noextension", "text", "unknown extension ''"),
    ],
)
def test_unreadable_file_is_a_one_line_error(load, capfd, name, content, part):
    _one_line(lambda: load(name, content), part, name)
    assert "Failed to" not in capfd.readouterr().err


def test_missing_file_folder_or_source_is_a_one_line_error(load, tmp_path):
    _one_line(lambda: load_raw(load.args(train_file="no/such.csv")), "--train_file no/such.csv does not exist")
    _one_line(
        lambda: load_raw(load.args(validation_file=str(tmp_path / "*.csv"))), "--validation_file", "does not exist"
    )
    (tmp_path / "empty").mkdir()
    _one_line(lambda: load_raw(load.args(train_file=str(tmp_path / "empty"))), "without source or text files")
    _one_line(lambda: load_raw(DataArguments()), "give --train_file and --validation_file, or --dataset_name")
    _one_line(lambda: load_raw(DataArguments(train_file="a.csv", dataset_name="glue")), "need one source")


def test_cache_that_cannot_be_written_names_the_option(load, tmp_path):
    (tmp_path / "file").write_text("")
    path = load.write("a.csv", "text,label\na,0\nb,1\n")
    _one_line(lambda: load_raw(DataArguments(train_file=path, data_cache=str(tmp_path / "file"))), "--data_cache")


# The Hub, as a folder laid out like one ------------------------------------------------------------------------------


@pytest.fixture
def hub(tmp_path: Path) -> str:
    folder = tmp_path / "glue"
    (folder / "mrpc").mkdir(parents=True)
    for split, count in (("train", 6), ("validation", 4), ("test", 2)):
        lines = [
            json.dumps(
                {"sentence1": f"a{i}", "sentence2": f"b{i}", "label": i % 2 if split != "test" else -1, "idx": i}
            )
            for i in range(count)
        ]
        (folder / "mrpc" / f"{split}.jsonl").write_text("\n".join(lines))
    files = "\n".join(f"  - split: {s}\n    path: mrpc/{s}.jsonl" for s in ("train", "validation", "test"))
    names = "dataset_info:\n- config_name: mrpc\n  features:\n  - {name: sentence1, dtype: string}\n"
    names += "  - {name: sentence2, dtype: string}\n  - name: label\n    dtype:\n      class_label:\n        names:\n"
    names += "          '0': not_equivalent\n          '1': equivalent\n  - {name: idx, dtype: int32}\n"
    (folder / "README.md").write_text(f"---\nconfigs:\n- config_name: mrpc\n  data_files:\n{files}\n{names}---\n")
    return str(folder)


def test_glue_of_the_hub_knows_columns_names_and_splits(load, hub):
    raw = load_raw(load.args(dataset_name=hub, dataset_config_name="mrpc"))
    assert (raw.glue_name, raw.task, raw.text_columns) == ("mrpc", "classification", ("sentence1", "sentence2"))
    assert raw.id2label == {0: "not_equivalent", 1: "equivalent"}  # the data set's own order, not the alphabet's
    assert (len(raw.train), len(raw.validation)) == (6, 4)
    part = load_raw(load.args(dataset_name=hub, dataset_config_name="mrpc", train_split="train[:50%]"))
    assert part.train["sentence1"][:] == ["a0", "a1", "a2"]


def test_hub_errors_are_one_line(load, hub):
    def call(**options: Any) -> Callable[[], RawData]:
        return lambda: load_raw(load.args(dataset_name=hub, **options))

    _one_line(call(), "holds several tasks; give --dataset_config_name", "mrpc")
    _one_line(call(dataset_config_name="nope"), "nope", "check its name, configuration and split")
    _one_line(call(dataset_config_name="mrpc", validation_split="dev"), "dev", "check its name")
    _one_line(call(dataset_config_name="mrpc", validation_split="test"), "row 1 of the validation data", "no 'label'")


# Columns and labels --------------------------------------------------------------------------------------------------


def _prepare(columns: dict[str, list], validation: dict[str, list] | None = None, **options: Any) -> RawData:
    sets = [Dataset.from_dict(rows) if rows is not None else None for rows in (columns, validation)]
    return prepare(sets[0], sets[1], DataArguments(**options))


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
    raw = _prepare(columns)
    assert raw.text_columns == texts and raw.train.column_names == [*texts, "labels"]
    assert [raw.id2label[i] for i in raw.train["labels"]] == [str(value) for value in columns[label]]


def test_arguments_override_the_guess():
    columns = {"a": ["a", "b"], "b": ["c", "d"], "label": [0, 1], "y": ["p", "q"]}
    raw = _prepare(columns, text_column="b", label_column="y")
    assert raw.text_columns == ("b",) and raw.id2label == {0: "p", 1: "q"}
    assert _prepare(columns, text_column="b", text_pair_column="a").text_columns == ("b", "a")
    assert _prepare({**columns, "text": ["e", "f"]}, task="causal-lm").text_columns == ("text",)


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
        ({"text": ["a", "b"], "label": ["1.5", "high"]}, {"task": "regression"}, ["row 1", "'1.5'", "needs numbers"]),
        ({"text": ["a", "b"], "label": [0, 1]}, {"validation_fraction": 0.9}, ["leaves none to train on"]),
    ],
)  # fmt: skip
def test_columns_that_do_not_do_are_one_line_errors(columns, options, parts):
    _one_line(lambda: _prepare(columns, **options), *parts)


def test_validation_is_checked_as_training_is(load):
    train = {"text": ["a", "b"], "label": ["yes", "no"]}
    odd = {"text": ["a", "b"], "label": ["Yes", "maybe"]}
    _one_line(lambda: _prepare(train, odd), "validation data", "'Yes', 'maybe'", "expected 'no', 'yes'")
    _one_line(lambda: _prepare(train, {"text": ["a"], "y": ["no"]}), "no column 'label' in the validation data")
    _one_line(lambda: _prepare(train, {"text": [None], "label": ["no"]}), "row 1 of the validation data")
    csv_train = "text,label\na,0\nb,1\n"
    _one_line(
        lambda: load("d.csv", csv_train, "text,label\na,\n"), "row 1 of the validation data", "d.csv", "no 'label'"
    )
    _one_line(
        lambda: load("d.csv", csv_train, "text,label\n,1\n"), "row 1 of the validation data", "d.csv", "no 'text'"
    )
    assert _prepare(train, {"text": ["a"], "label": ["no"]}).validation["labels"][:] == [0]


@settings(deadline=None, max_examples=60)
@given(st.one_of(st.lists(st.integers(-99, 99)), st.lists(st.text(st.characters(codec="utf-8"), min_size=1))))
def test_label_map_is_a_bijection_in_sorted_order_that_gives_every_label_back(values):
    values = [v.strip() if isinstance(v, str) else v for v in values]
    values = [v for v in values if v != ""]
    values += [1, 2] if all(isinstance(v, int) for v in values) else ["one", "two"]
    raw = _prepare({"text": ["t"] * len(values), "label": values}, {"text": ["t"], "label": values[-1:]})
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
    raw = _prepare(columns)
    assert raw.task == task
    forced = _prepare(columns, task="regression")
    assert forced.task == "regression" and forced.num_labels == 1 and forced.id2label == {}
    assert forced.train["labels"][:] == [float(value) for value in values]
    assert forced.train.features["labels"] == Value("float32")


def test_names_of_a_trained_model_fix_the_ids(load):
    names = {0: "no", 1: "perhaps", 2: "yes"}
    path = load.write("v.csv", "text,label\na,yes\nb,no\n")
    raw = load_raw(load.args(validation_file=path), id2label=names)
    assert raw.train is None and raw.validation["labels"][:] == [2, 0] and raw.id2label == names
    other = load.write("v.csv", "text,label\na,never\n")
    _one_line(
        lambda: load_raw(load.args(validation_file=other), id2label=names), "'never'", "expected 'no', 'perhaps', 'yes'"
    )


def test_class_label_of_a_data_set_keeps_its_names_and_order():
    features = Features({"text": Value("string"), "label": ClassLabel(names=["z", "a"])})
    rows = Dataset.from_dict({"text": ["t", "u"], "label": [0, 1]}, features)
    raw = prepare(rows, None, DataArguments())
    assert raw.id2label == {0: "z", 1: "a"} and raw.train["labels"][:] == [0, 1]


def test_samples_are_fixed_nested_and_in_order():
    columns = {"text": [f"t{i:03}" for i in range(100)], "label": [i % 2 for i in range(100)]}
    small, again, large = (_prepare(columns, max_train_samples=n).train["text"][:] for n in (10, 10, 30))
    assert len(small) == 10 and small == again and set(small) < set(large) and large == sorted(large)
    raw = _prepare(columns, columns, max_eval_samples=7)
    assert len(raw.train) == 100 and len(raw.validation) == 7
    held = _prepare(columns, validation_fraction=0.2)
    assert len(held.validation) == 20 and not set(held.train["text"]) & set(held.validation["text"])


# Tokens --------------------------------------------------------------------------------------------------------------


def test_tokens_are_unpadded_and_the_collator_pads_to_the_longest(tokenizer):
    raw = _prepare({"a": ["one", "longer"], "b": ["x", "y"], "label": [0, 1]}, {"a": ["z"], "b": ["z"], "label": [1]})
    tokens = tokenize(raw, tokenizer, DataArguments(), model_max_length=16)
    assert set(tokens) == {"train", "validation"}
    assert set(tokens["train"].column_names) == {"input_ids", "token_type_ids", "attention_mask", "labels"}
    assert [len(ids) for ids in tokens["train"]["input_ids"]] == [3 + 1 + 3, 6 + 1 + 3]
    assert tokens["train"][0]["token_type_ids"] == [0] * 5 + [1] * 2
    batch = collator("classification", tokenizer)([tokens["train"][i] for i in range(2)])
    assert batch["input_ids"].shape == (2, 10) and batch["labels"].tolist() == [0, 1]
    assert batch["attention_mask"].sum(1).tolist() == [7, 10]


def test_regression_labels_are_floats_in_the_batch(tokenizer):
    raw = _prepare({"text": ["a", "b"], "label": [0.5, 1.25]})
    tokens = tokenize(raw, tokenizer, DataArguments())["train"]
    batch = collator(raw.task, tokenizer)([tokens[i] for i in range(2)])
    assert batch["labels"].dtype == torch.float32 and batch["labels"].tolist() == [0.5, 1.25]


def test_text_the_model_cannot_take_is_an_error_unless_a_length_is_given(tokenizer):
    raw = _prepare({"text": ["a", "b" * 30], "label": [0, 1]})
    parts = ("train row 2", "'bbbb", "32 tokens", "the model takes 16", "--max_seq_length 16")
    _one_line(lambda: tokenize(raw, tokenizer, DataArguments(), 16), *parts)
    cut = tokenize(raw, tokenizer, DataArguments(max_seq_length=16), 16)["train"]
    assert [len(ids) for ids in cut["input_ids"]] == [3, 16] and cut[1]["input_ids"][-1] == tokenizer.sep_token_id
    assert len(tokenize(raw, tokenizer, DataArguments(), 32)["train"][1]["input_ids"]) == 32
    assert len(tokenize(raw, tokenizer, DataArguments())["train"][1]["input_ids"]) == 32
    _one_line(
        lambda: tokenize(raw, tokenizer, DataArguments(max_seq_length=17), 16), "--max_seq_length is 17", "takes 16"
    )


def test_length_a_tokenizer_was_saved_with_does_not_cut_or_pad(tokenizer):
    inner = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    inner.enable_truncation(8)
    inner.enable_padding(length=8)
    saved = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="[PAD]", eos_token="[EOS]")
    raw = _prepare({"text": ["a", "b" * 30], "label": [0, 1]})
    assert [len(ids) for ids in tokenize(raw, saved, DataArguments())["train"]["input_ids"]] == [3, 32]


@settings(deadline=None)
@given(st.lists(st.lists(st.lists(st.integers(0, 9)), max_size=4)), st.integers(1, 12))
def test_packing_loses_no_token_but_the_remainder(batches, size):
    pack = _packer(size)
    blocks = [block for batch in batches for block in pack({"input_ids": batch})["input_ids"]]
    stream = [token for batch in batches for document in batch for token in document]
    assert all(len(block) == size for block in blocks)
    packed = list(itertools.chain.from_iterable(blocks))
    assert packed == stream[: len(packed)] and 0 <= len(stream) - len(packed) < size


@settings(deadline=None, max_examples=15)
@given(st.lists(st.text(st.characters(codec="utf-8"), max_size=12), min_size=1, max_size=30), st.integers(1, 9))
def test_documents_are_joined_by_one_end_token_each(tokenizer, documents, size):
    documents.append("never less than one block")
    blocks = tokenize(_prepare({"text": documents}), tokenizer, DataArguments(block_size=size), 64)["train"]
    assert blocks["labels"][:] == blocks["input_ids"][:] and blocks.column_names == ["input_ids", "labels"]
    stream = list(itertools.chain.from_iterable(blocks["input_ids"]))
    expected = "".join(f"{document}[EOS]" for document in documents if document.strip())
    ids = tokenizer(expected, add_special_tokens=False)["input_ids"]
    assert stream == ids[: len(stream)] and len(ids) - len(stream) < size


def test_packing_goes_on_across_batches_of_documents(tokenizer):
    raw = _prepare({"text": ["abc"] * 2500})
    blocks = tokenize(raw, tokenizer, DataArguments(block_size=7))["train"]
    assert len(blocks) == 2500 * 4 // 7
    batch = collator("causal-lm", tokenizer)([blocks[i] for i in range(3)])
    assert batch["input_ids"].shape == (3, 7) and torch.equal(batch["labels"], batch["input_ids"])
    few = tokenize(raw, tokenizer, DataArguments(block_size=7, max_train_samples=5))["train"]
    assert len(few) == 5


def test_block_size_defaults_to_1024_or_the_models_maximum(tokenizer):
    raw = _prepare({"text": ["abcdefg"] * 512})
    for limit, size in ((64, 64), (4096, 1024), (None, 1024)):
        assert len(tokenize(raw, tokenizer, DataArguments(), limit)["train"][0]["input_ids"]) == size
    _one_line(lambda: tokenize(raw, tokenizer, DataArguments(block_size=65), 64), "--block_size is 65", "takes 64")
    _one_line(
        lambda: tokenize(_prepare({"text": ["ab", "", "c"]}), tokenizer, DataArguments(block_size=6)),
        "the train data has 5 tokens, less than one block of 6",
    )
    _one_line(lambda: tokenize(_prepare({"text": [" "]}), tokenizer, DataArguments()), "has 0 tokens")


def test_tokenizer_without_the_token_that_is_needed_is_a_one_line_error(tokenizer):
    bare = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    _one_line(lambda: collator("classification", bare), "no padding token", "tokenizer.pad_token")
    _one_line(lambda: tokenize(_prepare({"text": ["a"]}), bare, DataArguments()), "no end-of-sequence token")


def test_tokenizing_again_reads_the_cache_also_after_the_tokenizer_was_used(load, tokenizer):
    raw = load("a.csv", "text,label\na,0\nb,1\n")
    first = tokenize(raw, tokenizer, load.args())["train"]
    tokenizer(["a", "bcd"], padding=True, truncation=True, max_length=3)
    again = tokenize(raw, tokenizer, load.args())["train"]
    assert first.cache_files and first.cache_files == again.cache_files
    assert tokenize(raw, tokenizer, load.args(max_seq_length=2))["train"].cache_files != first.cache_files


def test_worker_processes_give_the_same_tokens_and_errors(tokenizer):
    raw = _prepare({"text": ["a", "bc", "def", "g" * 30], "label": [0, 1, 0, 1]})
    tokens = [tokenize(raw, tokenizer, DataArguments(preprocessing_num_workers=n))["train"][:] for n in (None, 2)]
    assert tokens[0] == tokens[1]
    _one_line(
        lambda: tokenize(raw, tokenizer, DataArguments(preprocessing_num_workers=2), 16), "train row 4", "32 tokens"
    )


# Arguments -----------------------------------------------------------------------------------------------------------


def test_arguments_come_from_the_command_line_with_help_for_each(capsys):
    parser = HfArgumentParser(DataArguments)
    (args,) = parser.parse_args_into_dataclasses(
        ["--train_file", "a.csv", "--max_seq_length", "128", "--task", "regression"]
    )
    assert args == DataArguments(train_file="a.csv", max_seq_length=128, task="regression")
    assert parser.parse_dict({"block_size": 64})[0].block_size == 64
    with pytest.raises(SystemExit):
        parser.parse_args(["--help"])
    text = capsys.readouterr().out
    for field in DataArguments.__dataclass_fields__.values():
        assert f"--{field.name}" in text and field.metadata["help"]


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"task": "translation"}, "one of auto, classification, regression, causal-lm"),
        ({"documents": "page"}, "one of auto, line, file"),
        ({"max_train_samples": 0}, "--max_train_samples is 0"),
        ({"block_size": -1}, "--block_size is -1"),
        ({"validation_fraction": 1.0}, "--validation_fraction is 1.0"),
    ],
)
def test_argument_out_of_range_is_a_one_line_error(options, part):
    _one_line(lambda: DataArguments(**options), part)
