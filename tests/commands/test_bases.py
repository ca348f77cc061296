"""The verbs, on bases that are not whole or not as they were: a small BERT in a folder."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf

from mlfs.cli import main

WORDS = [f"w{i}" for i in range(40)]
SPACE = '{"hidden": [32, 16], "heads": [4, 2], "ffn": [32, 16], "layers": [2, 1]}'


def tokenizer_in(folder: Path) -> Any:
    folder.mkdir(parents=True)
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]))
    return tf.BertTokenizerFast(vocab_file=str(folder / "vocab.txt"))


def write_data(path: Path) -> str:
    rows = [f"{WORDS[i % 40]} {WORDS[(i * 7) % 40]}\t{i % 2}\n" for i in range(16)]
    path.write_text("sentence\tlabel\n" + "".join(rows))
    return str(path)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A masked language model, without the pooler that a classifier has."""
    tokenizer = tokenizer_in(tmp_path / "vocabulary")
    config = tf.BertConfig(
        vocab_size=45, hidden_size=32, num_attention_heads=4, intermediate_size=32, num_hidden_layers=2,
        max_position_embeddings=32,
    )  # fmt: skip
    tf.BertForMaskedLM(config).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def test_a_base_without_pooler_is_trained_scored_and_exported(base: Path, tmp_path: Path, capsys: Any) -> None:
    data, run, out = write_data(tmp_path / "data.tsv"), tmp_path / "run", tmp_path / "out"
    words = ["train", "--model", str(base), "--train_file", data, "--validation_file", data, "--output_dir", str(run),
             "--space", SPACE, "--stage_steps", "2", "--per_device_train_batch_size", "8", "--order_batches", "1",
             "--disable_tqdm", "true"]  # fmt: skip
    assert main(words) == 0
    results = json.loads((run / "results.json").read_text())
    capsys.readouterr()
    torch.manual_seed(7)  # what loading draws is drawn anew
    assert main(["eval", str(run), "--subnet", "max", "--validation_file", data]) == 0
    scored = json.loads(capsys.readouterr().out)
    assert main(["export", str(run), "--subnet", "max", "--output_dir", str(out)]) == 0
    exported = tf.AutoModelForSequenceClassification.from_pretrained(out)
    assert exported.bert.pooler is not None
    row = results["palette"][0]
    kept = row.keys() - {"name", "latency", "sizes", "subnet"}
    assert "loss" in kept and {key: scored[key] for key in kept} == pytest.approx({key: row[key] for key in kept})
