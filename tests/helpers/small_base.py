"""A BERT of some thousand weights with its tokenizer and data, in files, for tests of the command line."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

WORDS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "fine", "dull", "film", "play", "a", "the", "very", "not", "what")
SPACE = '{"hidden": [16, 8], "heads": [2, 1], "ffn": [24, 12], "layers": [2, 1]}'


def write_base(folder: Path, seed: int = 0) -> Path:
    """Writes model and tokenizer; returns the folder."""
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=len(WORDS), hidden_size=16, num_attention_heads=2, intermediate_size=24, num_hidden_layers=2,
        max_position_embeddings=16, pad_token_id=0,
    )  # fmt: skip

    BertForSequenceClassification(config).save_pretrained(folder)
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, "[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    PreTrainedTokenizerFast(tokenizer_object=core, **names).save_pretrained(folder)
    return folder


def write_data(folder: Path) -> tuple[str, str]:
    """Writes training and validation data of two labels, "bad" and "good"; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    texts = [
        f"{a} {b} {c}"
        for a in ("a", "the")
        for b in ("fine", "dull", "very dull", "not fine")
        for c in ("film", "play")
    ]
    rows = [f"{text}\t{'bad' if 'dull' in text or 'not' in text else 'good'}" for text in texts]
    for name, part in (("train.tsv", rows), ("dev.tsv", rows[::2])):
        (folder / name).write_text("\n".join(["sentence\tlabel", *part]) + "\n")
    return str(folder / "train.tsv"), str(folder / "dev.tsv")


def train_words(base: str | Path, data: tuple[str, str], run: str | Path) -> list[str]:
    """Returns the words of a short `mlfs train`: three stages of 4 steps, a checkpoint every 2."""
    return ["train", "--model", str(base), "--train_file", data[0], "--validation_file", data[1], "--output_dir",
            str(run), "--space", SPACE, "--rank", "2", "--stage_steps", "4", "--save_strategy", "steps",
            "--save_steps", "2", "--per_device_train_batch_size", "4", "--order_batches", "2", "--projection_size", "8",
            "--disable_tqdm", "true", "--use_cpu", "true"]  # fmt: skip
