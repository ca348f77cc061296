"""Files, folders and Hub data sets are read as they stand; what cannot be read is an error of one line."""

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from datasets import Dataset, arrow_dataset, formatting
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mlfs.data import files
from mlfs.data.arguments import DataArguments
from mlfs.data.raw import RawData, load_raw
from tests.helpers.data import Load, one_line_error

GLUE = Path(__file__).parents[3] / "shared" / "data" / "glue"
needs_glue = pytest.mark.skipif(not GLUE.is_dir(), reason=f"no GLUE data at {GLUE}")


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
    one_line_error(lambda: load_raw(load.args(train_file=pattern)), "part-c.csv differs from that of part-a.csv")
    (tmp_path / "part-d.tsv").write_text("label\ttext\n1\tthree\n")
    one_line_error(lambda: load_raw(load.args(train_file=str(tmp_path / "part-*"))), "several kinds (csv, tsv)")


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
    one_line_error(lambda: load(name, content), part, name)
    assert "Failed to" not in capfd.readouterr().err


def test_missing_file_folder_or_source_is_a_one_line_error(load, tmp_path):
    one_line_error(lambda: load_raw(load.args(train_file="no/such.csv")), "--train_file no/such.csv does not exist")
    one_line_error(
        lambda: load_raw(load.args(validation_file=str(tmp_path / "*.csv"))), "--validation_file", "does not exist"
    )
    (tmp_path / "empty").mkdir()
    one_line_error(lambda: load_raw(load.args(train_file=str(tmp_path / "empty"))), "without source or text files")
    one_line_error(lambda: load_raw(DataArguments()), "give --train_file and --validation_file, or --dataset_name")
    one_line_error(lambda: load_raw(DataArguments(train_file="a.csv", dataset_name="glue")), "need one source")


def test_cache_that_cannot_be_written_names_the_option(load, tmp_path):
    (tmp_path / "file").write_text("")
    path = load.write("a.csv", "text,label\na,0\nb,1\n")
    one_line_error(lambda: load_raw(DataArguments(train_file=path, data_cache=str(tmp_path / "file"))), "--data_cache")


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

    one_line_error(call(), "holds several tasks; give --dataset_config_name", "mrpc")
    one_line_error(call(dataset_config_name="nope"), "nope", "check its name, configuration and split")
    one_line_error(call(dataset_config_name="mrpc", validation_split="dev"), "dev", "check its name")
    one_line_error(
        call(dataset_config_name="mrpc", validation_split="test"), "row 1 of the validation data", "no 'label'"
    )


@pytest.mark.parametrize(
    ("name", "content", "signs"),
    [
        ("a.csv", "sentence;label\nhello there;1\nbad day;0\n", ("commas", "2 with semicolons")),
        ("a.csv", 'sentence;label\n"hello, there";1\n"bad; day";0\n', ("commas", "2 with semicolons")),
        ("a.csv", "sentence\tlabel\nhello there\t1\nbad day\t0\n", ("commas", "2 with tabs")),
        ("a.csv", "id|sentence|label\n1|hello|1\n2|bad|0\n", ("commas", "3 with bars")),
        ("a.tsv", "sentence,label\nhello there,1\nbad day,0\n", ("tabs", "2 with commas")),
    ],
)
def test_columns_between_other_separators_do_not_pass_for_one_text(load, name, content, signs):
    one_line_error(lambda: load(name, content), *signs)


@pytest.mark.parametrize("content", ["text\nhello; there\nbad day\n", "a;text\nhello; my; friend\nbad day\n"])
def test_one_column_of_text_may_hold_semicolons(load, content):
    raw = load_raw(load.args(train_file=load.write("a.csv", content)))
    assert raw.task == "causal-lm" and raw.train[raw.text_columns[0]][:] == content.splitlines()[1:]


def test_too_many_columns_are_refused_before_the_file_is_read(load):
    names = ["text", "label", *(f"column{i}" for i in range(files.MAX_COLUMNS))]
    content = "\n".join(",".join(row) for row in (names, ["x"] * len(names), ["y"] * len(names)))
    one_line_error(lambda: load("a.csv", content), "20,002 columns", "keep those of text and label")


def test_the_work_for_a_table_grows_with_its_columns_and_no_faster(load, monkeypatch):
    """`datasets` copies or reads all columns where one is asked for: so it may be asked a fixed number of times."""
    asked = []
    original = Dataset.features.fget
    monkeypatch.setattr(Dataset, "features", property(lambda self: asked.append(1) or original(self)))
    formatted = []
    original_format = formatting.format_table
    monkeypatch.setattr(
        arrow_dataset, "format_table", lambda *args, **kwargs: formatted.append(1) or original_format(*args, **kwargs)
    )
    counts = []
    for width in (3, 40):
        asked.clear()
        formatted.clear()
        names = ["text", "label", *(f"column{i}" for i in range(width))]
        rows = [["x", "1"] + ["1"] * width, ["y", "0"] + ["1"] * width]
        path = load.write(f"{width}.csv", "\n".join(",".join(row) for row in (names, *rows)))
        assert load_raw(load.args(train_file=path)).text_columns == ("text",)
        counts.append((len(asked), len(formatted)))
    assert counts[0] == counts[1]
