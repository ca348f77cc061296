"""Makes texts into token ids, and examples into batches."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pyarrow.compute as pc
from datasets import Dataset, DatasetDict, Features, List, Value
from transformers import DataCollatorWithPadding, PreTrainedTokenizerBase, default_data_collator

from mlfs.data.arguments import DataArguments
from mlfs.data.raw import RawData, sample
from mlfs.errors import MLFSError


def tokenize(
    raw: RawData, tokenizer: PreTrainedTokenizerBase, args: DataArguments, model_max_length: int | None = None
) -> DatasetDict:
    """Makes token ids of `raw`, without padding.

    For causal-lm, documents joined by the end-of-sequence token are cut into blocks of `args.block_size` tokens; the
    last block, if it is incomplete, is dropped.

    Args:
        model_max_length: the longest input of the model; the tokenizer's own maximum counts if it is smaller.

    Returns:
        Data sets "train" and "validation", those that `raw` has, of `input_ids` and `labels`; but for causal-lm also of
        what else the tokenizer makes (`attention_mask`, `token_type_ids`). For causal-lm `labels` equal `input_ids`.

    Raises:
        MLFSError: a text is longer than the longest input and `args.max_seq_length` does not cut it, a length in `args`
            is larger than that, there is less text than one block, or (causal-lm) the tokenizer has no end-of-sequence
            token.
    """
    # transformers states "no maximum" of a tokenizer as a number of 1e30
    lengths = [n for n in (model_max_length, tokenizer.model_max_length) if n is not None and n < 10**9]
    limit = min(lengths, default=None)
    blocks = raw.task == "causal-lm"
    option, length = ("block_size", args.block_size) if blocks else ("max_seq_length", args.max_seq_length)
    if length is not None and limit is not None and length > limit:
        raise MLFSError(f"--{option} is {length}, but the model takes {limit} tokens; give --{option} {limit} or less")
    done = {}
    for name, rows in (("train", raw.train), ("validation", raw.validation)):
        if rows is None:
            continue
        if blocks:
            size = length or min(1024, limit or 1024)
            done[name] = _blocks(rows, name, raw.text_columns[0], tokenizer, size, args.preprocessing_num_workers)
            continue
        options = {"tokenizer": tokenizer, "columns": raw.text_columns, "cut": length, "limit": limit, "place": name}
        done[name] = rows.map(
            _encode,
            batched=True,
            with_indices=True,
            remove_columns=list(raw.text_columns),
            fn_kwargs=options,
            num_proc=args.preprocessing_num_workers,
            desc=f"Tokenizing {name}",
        )
    return DatasetDict(sample(done, args) if blocks else done)


def collator(task: str, tokenizer: PreTrainedTokenizerBase) -> Callable[[list[dict[str, Any]]], dict[str, Any]]:
    """Makes the function that puts examples into a batch: padded to the longest one; causal-lm blocks are stacked.

    Raises:
        MLFSError: examples of `task` need padding, and the tokenizer has no padding token.
    """
    if task == "causal-lm":
        return default_data_collator
    if tokenizer.pad_token is None:
        raise MLFSError(
            "the tokenizer has no padding token, which batches of texts need; set tokenizer.pad_token = "
            "tokenizer.eos_token and model.config.pad_token_id = tokenizer.eos_token_id"
        )
    return DataCollatorWithPadding(tokenizer)


def _encode(
    batch: dict[str, list[Any]],
    indices: list[int],
    *,
    tokenizer: PreTrainedTokenizerBase,
    columns: tuple[str, ...],
    cut: int | None,
    limit: int | None,
    place: str,
) -> dict[str, Any]:
    """Tokenizes a batch of rows, cut to `cut` tokens; MLFSError, which names the row, for one longer than `limit`."""
    texts = [batch[column] for column in columns]
    encoded = tokenizer(*texts, truncation=cut is not None, max_length=cut, padding=False, verbose=False)
    for index, text, ids in zip(indices, texts[0], encoded["input_ids"], strict=True):
        if limit is not None and len(ids) > limit:
            raise MLFSError(
                f"{place} row {index + 1} ({text[:40]!r}...) has {len(ids)} tokens, but the model takes {limit}; "
                f"give --max_seq_length {limit} to cut longer texts, or shorten them"
            )
    return dict(encoded)


def _blocks(
    rows: Dataset, place: str, column: str, tokenizer: PreTrainedTokenizerBase, size: int, workers: int | None
) -> Dataset:
    """Makes documents into blocks of `size` tokens."""
    if tokenizer.eos_token_id is None:
        raise MLFSError("the tokenizer has no end-of-sequence token to join documents with; set tokenizer.eos_token")
    ids = List(Value("int32"))
    tokens = rows.map(
        _token_ids,
        batched=True,
        remove_columns=rows.column_names,
        features=Features({"input_ids": ids}),
        fn_kwargs={"tokenizer": tokenizer, "column": column},
        num_proc=workers,
        desc=f"Tokenizing {place}",
    )
    # One process, in order: what a batch leaves over begins the next one's first block.
    blocks = tokens.map(
        _packer(size),
        batched=True,
        remove_columns=["input_ids"],
        features=Features({"input_ids": ids, "labels": ids}),
        desc=f"Packing {place}",
    )
    if not len(blocks):
        count = pc.sum(pc.list_value_length(tokens.data.column("input_ids"))).as_py() or 0
        raise MLFSError(
            f"the {place} data has {count} tokens, less than one block of {size}; give more, or --block_size"
        )
    return blocks


def _token_ids(batch: dict[str, list[Any]], *, tokenizer: PreTrainedTokenizerBase, column: str) -> dict[str, Any]:
    """Tokenizes documents, each with an end-of-sequence token; those without a visible character are left out."""
    texts = [text for text in batch[column] if text.strip()]
    if not texts:
        return {"input_ids": []}
    encoded = tokenizer(texts, add_special_tokens=False, truncation=False, padding=False, verbose=False)
    return {"input_ids": [[*ids, tokenizer.eos_token_id] for ids in encoded["input_ids"]]}


def _packer(size: int) -> Callable[[dict[str, list[list[int]]]], dict[str, list[list[int]]]]:
    """Makes a function that cuts batches of documents into blocks, and keeps what is left over for its next call."""
    rest: list[int] = []

    def pack(batch: dict[str, list[list[int]]]) -> dict[str, list[list[int]]]:
        rest.extend(itertools.chain.from_iterable(batch["input_ids"]))
        whole = len(rest) // size * size
        blocks = [rest[i : i + size] for i in range(0, whole, size)]
        del rest[:whole]
        return {"input_ids": blocks, "labels": blocks}

    return pack
