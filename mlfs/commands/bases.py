"""Pretrained models by name, with tokenizer, task head and the sizes to offer."""

from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging

from mlfs.data.raw import RawData
from mlfs.errors import MLFSError
from mlfs.models.pretrained import SHORT_NAMES, place_of
from mlfs.parsing import parse_yaml
from mlfs.space.search_space import SearchSpace
from mlfs.supernet.model import SuperTransformer
from mlfs.training.arguments import MLFSArguments


@dataclass
class ModelArguments:
    """Which model, and the sizes to offer."""

    model: str = field(metadata={"help": "A Hub name, or a folder; also minilm, smollm2."})
    space: str | None = field(
        default=None,
        metadata={
            "help": "Sizes on offer: {hidden: [...], heads: [...], ffn: [...], layers: [...]}; largest first. "
            "Layers are numbers (order_layers says which ones) or lists of indices. Default: the model's own, two "
            "thirds and half of the width, half and quarter feed-forward, all and half of the layers."
        },
    )
    per_layer: bool = field(default=False, metadata={"help": "Draw heads and feed-forward sizes anew for each layer."})
    revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of the model on the Hub."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Run code that the model's repository brings."})

    def search_space(self) -> SearchSpace | None:
        """Reads `space`, YAML or JSON; None where it is not given, for the default. Raises MLFSError if it is none."""
        if self.space is None:
            return None
        return SearchSpace.from_dict(parse_yaml(self.space, "--space"))


def load_tokenizer(name: str, **options: Any) -> PreTrainedTokenizerBase:
    """Loads a model's tokenizer, with a padding token: its own, else the end-of-sequence token.

    Args:
        name: a Hub name, a folder, or a short name. **options: of `from_pretrained`.

    Raises:
        MLFSError: there is no such model.
    """
    with _readable("tokenizer", name):
        tokenizer = AutoTokenizer.from_pretrained(place_of(name), **options)
    if tokenizer.pad_token is None and tokenizer.eos_token is not None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(name: str, raw: RawData, tokenizer: PreTrainedTokenizerBase, **options: Any) -> PreTrainedModel:
    """Loads a pretrained model with a head for the task of `raw`; in fp32 unless `options` say otherwise.

    Args:
        name: a Hub name, a folder, or a short name. tokenizer: its padding token goes into a model that has none.
        **options: of `from_pretrained`.

    Raises:
        MLFSError: there is no such model.
    """
    options = {"dtype": torch.float32} | options
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # that the head is new is expected
    try:
        with _readable("model", name):
            auto: Any = AutoModelForCausalLM if raw.task == "causal-lm" else AutoModelForSequenceClassification
            model = auto.from_pretrained(place_of(name), **_head_options(raw), **options)
    finally:
        logging.set_verbosity(verbosity)
    if getattr(model.config, "pad_token_id", None) is None:
        model.config.pad_token_id = tokenizer.pad_token_id
    return model


def max_length(model: PreTrainedModel) -> int | None:
    """Returns how many tokens the model takes; None where its configuration does not say."""
    positions = getattr(model.config, "max_position_embeddings", None)
    # RoBERTa counts positions from after its padding index.
    offset = model.config.pad_token_id + 1 if model.config.model_type == "roberta" else 0
    return positions - offset if positions else None


def make_supernet(model: PreTrainedModel, model_args: ModelArguments, args: MLFSArguments) -> SuperTransformer:
    """Makes the super-transformer that the arguments ask for; its base is recorded under the name the user gave, a
    folder by its absolute path.

    Raises:
        MLFSError: the model's family is not in the table, or the space does not fit it.
    """
    space = model_args.search_space()
    name = SHORT_NAMES.get(model_args.model, model_args.model)
    supernet = SuperTransformer(model, space, args.rank, alpha=args.lora_alpha, base_name=name)
    if model_args.per_layer:
        supernet.space = supernet.space.with_per_layer()
    return supernet


def _head_options(raw: RawData) -> dict[str, Any]:
    """What the configuration says of the head: nothing for language models, else the labels."""
    if raw.task == "causal-lm":
        return {}
    if raw.task == "classification":
        return {"num_labels": raw.num_labels, "id2label": raw.id2label, "label2id": raw.label2id}
    return {"num_labels": raw.num_labels, "problem_type": "regression"}


class _readable:
    """Turns what transformers raises for a model that is not there into one line."""

    def __init__(self, what: str, name: str) -> None:
        self.what, self.name = what, name

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, (OSError, ValueError)) and not isinstance(error, MLFSError):
            first = next(iter(str(error).strip().splitlines()), type(error).__name__)
            raise MLFSError(f"no {self.what} {self.name!r}: {first} Give a Hub name or a folder") from None
