"""Texts to token ids, documents to blocks, examples to batches."""

import itertools

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from mlfs.data.arguments import DataArguments
from mlfs.data.tokens import _packer, collator, tokenize
from tests.helpers.data import one_line_error, prepared


def test_tokens_are_unpadded_and_the_collator_pads_to_the_longest(tokenizer):
    raw = prepared({"a": ["one", "longer"], "b": ["x", "y"], "label": [0, 1]}, {"a": ["z"], "b": ["z"], "label": [1]})
    tokens = tokenize(raw, tokenizer, DataArguments(), model_max_length=16)
    assert set(tokens) == {"train", "validation"}
    assert set(tokens["train"].column_names) == {"input_ids", "token_type_ids", "attention_mask", "labels"}
    assert [len(ids) for ids in tokens["train"]["input_ids"]] == [3 + 1 + 3, 6 + 1 + 3]
    assert tokens["train"][0]["token_type_ids"] == [0] * 5 + [1] * 2
    batch = collator("classification", tokenizer)([tokens["train"][i] for i in range(2)])
    assert batch["input_ids"].shape == (2, 10) and batch["labels"].tolist() == [0, 1]
    assert batch["attention_mask"].sum(1).tolist() == [7, 10]


def test_regression_labels_are_floats_in_the_batch(tokenizer):
    raw = prepared({"text": ["a", "b"], "label": [0.5, 1.25]})
    tokens = tokenize(raw, tokenizer, DataArguments())["train"]
    batch = collator(raw.task, tokenizer)([tokens[i] for i in range(2)])
    assert batch["labels"].dtype == torch.float32 and batch["labels"].tolist() == [0.5, 1.25]


def test_text_the_model_cannot_take_is_an_error_unless_a_length_is_given(tokenizer):
    raw = prepared({"text": ["a", "b" * 30], "label": [0, 1]})
    parts = ("train row 2", "'bbbb", "32 tokens", "the model takes 16", "--max_seq_length 16")
    one_line_error(lambda: tokenize(raw, tokenizer, DataArguments(), 16), *parts)
    cut = tokenize(raw, tokenizer, DataArguments(max_seq_length=16), 16)["train"]
    assert [len(ids) for ids in cut["input_ids"]] == [3, 16] and cut[1]["input_ids"][-1] == tokenizer.sep_token_id
    assert len(tokenize(raw, tokenizer, DataArguments(), 32)["train"][1]["input_ids"]) == 32
    assert len(tokenize(raw, tokenizer, DataArguments())["train"][1]["input_ids"]) == 32
    one_line_error(
        lambda: tokenize(raw, tokenizer, DataArguments(max_seq_length=17), 16), "--max_seq_length is 17", "takes 16"
    )


def test_length_a_tokenizer_was_saved_with_does_not_cut_or_pad(tokenizer):
    inner = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    inner.enable_truncation(8)
    inner.enable_padding(length=8)
    saved = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="[PAD]", eos_token="[EOS]")
    raw = prepared({"text": ["a", "b" * 30], "label": [0, 1]})
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
    blocks = tokenize(prepared({"text": documents}), tokenizer, DataArguments(block_size=size), 64)["train"]
    assert blocks["labels"][:] == blocks["input_ids"][:] and blocks.column_names == ["input_ids", "labels"]
    stream = list(itertools.chain.from_iterable(blocks["input_ids"]))
    expected = "".join(f"{document}[EOS]" for document in documents if document.strip())
    ids = tokenizer(expected, add_special_tokens=False)["input_ids"]
    assert stream == ids[: len(stream)] and len(ids) - len(stream) < size


def test_packing_goes_on_across_batches_of_documents(tokenizer):
    raw = prepared({"text": ["abc"] * 2500})
    blocks = tokenize(raw, tokenizer, DataArguments(block_size=7))["train"]
    assert len(blocks) == 2500 * 4 // 7
    batch = collator("causal-lm", tokenizer)([blocks[i] for i in range(3)])
    assert batch["input_ids"].shape == (3, 7) and torch.equal(batch["labels"], batch["input_ids"])
    few = tokenize(raw, tokenizer, DataArguments(block_size=7, max_train_samples=5))["train"]
    assert len(few) == 5


def test_block_size_defaults_to_1024_or_the_models_maximum(tokenizer):
    raw = prepared({"text": ["abcdefg"] * 512})
    for limit, size in ((64, 64), (4096, 1024), (None, 1024)):
        assert len(tokenize(raw, tokenizer, DataArguments(), limit)["train"][0]["input_ids"]) == size
    one_line_error(lambda: tokenize(raw, tokenizer, DataArguments(block_size=65), 64), "--block_size is 65", "takes 64")
    one_line_error(
        lambda: tokenize(prepared({"text": ["ab", "", "c"]}), tokenizer, DataArguments(block_size=6)),
        "the train data has 5 tokens, less than one block of 6",
    )
    one_line_error(lambda: tokenize(prepared({"text": [" "]}), tokenizer, DataArguments()), "has 0 tokens")


def test_tokenizer_without_the_token_that_is_needed_is_a_one_line_error(tokenizer):
    bare = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    one_line_error(lambda: collator("classification", bare), "no padding token", "tokenizer.pad_token")
    one_line_error(lambda: tokenize(prepared({"text": ["a"]}), bare, DataArguments()), "no end-of-sequence token")


def test_tokenizing_again_reads_the_cache_also_after_the_tokenizer_was_used(load, tokenizer):
    raw = load("a.csv", "text,label\na,0\nb,1\n")
    first = tokenize(raw, tokenizer, load.args())["train"]
    tokenizer(["a", "bcd"], padding=True, truncation=True, max_length=3)
    again = tokenize(raw, tokenizer, load.args())["train"]
    assert first.cache_files and first.cache_files == again.cache_files
    assert tokenize(raw, tokenizer, load.args(max_seq_length=2))["train"].cache_files != first.cache_files


def test_worker_processes_give_the_same_tokens_and_errors(tokenizer):
    raw = prepared({"text": ["a", "bc", "def", "g" * 30], "label": [0, 1, 0, 1]})
    tokens = [tokenize(raw, tokenizer, DataArguments(preprocessing_num_workers=n))["train"][:] for n in (None, 2)]
    assert tokens[0] == tokens[1]
    one_line_error(
        lambda: tokenize(raw, tokenizer, DataArguments(preprocessing_num_workers=2), 16), "train row 4", "32 tokens"
    )
