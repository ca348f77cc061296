"""Small models of every family, with random weights, and inputs for them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers as tf
from transformers import PreTrainedModel

VOCABULARY, LENGTH, BATCH, PAD = 61, 11, 3, 1


def _bert_like(**extra: Any) -> dict[str, Any]:
    return dict(vocab_size=VOCABULARY, hidden_size=48, num_attention_heads=6, intermediate_size=40,
                num_hidden_layers=4, max_position_embeddings=40, pad_token_id=PAD, **extra)  # fmt: skip


def _llama_like(**extra: Any) -> dict[str, Any]:
    return _bert_like(num_key_value_heads=3, bos_token_id=2, eos_token_id=None, **extra)


def _gpt_like(**extra: Any) -> dict[str, Any]:
    return dict(vocab_size=VOCABULARY, n_embd=48, n_head=6, n_inner=40, n_layer=4, n_positions=40, pad_token_id=PAD,
                bos_token_id=2, eos_token_id=None, **extra)  # fmt: skip


@dataclass(frozen=True)
class Case:
    """Describes a small model: its configuration, the head classes of its family, and the heads to slice it to."""

    config: Callable[[], Any]
    name: str
    classes: tuple[str, ...]
    heads: tuple[int, ...] = (6, 4, 2)

    @property
    def is_decoder(self) -> bool:
        """Whether the family generates text."""
        return any("LM" in c and "Masked" not in c for c in self.classes)


_ENCODER = ("ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering", "ForMaskedLM")
_DECODER = ("ForCausalLM", "ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering")

CASES: dict[str, Case] = {
    "bert": Case(lambda: tf.BertConfig(**_bert_like()), "Bert", _ENCODER),
    "roberta": Case(lambda: tf.RobertaConfig(**_bert_like()), "Roberta", _ENCODER),
    "distilbert": Case(
        lambda: tf.DistilBertConfig(
            vocab_size=VOCABULARY,
            dim=48,
            n_heads=6,
            hidden_dim=40,
            n_layers=4,
            max_position_embeddings=40,
            pad_token_id=PAD,
        ),
        "DistilBert",
        _ENCODER,
    ),
    "gpt2": Case(
        lambda: tf.GPT2Config(**_gpt_like()),
        "GPT2",
        ("LMHeadModel", "ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering"),
    ),
    "gpt_bigcode-mqa": Case(
        lambda: tf.GPTBigCodeConfig(**_gpt_like(multi_query=True)),
        "GPTBigCode",
        ("ForCausalLM", "ForSequenceClassification", "ForTokenClassification"),
        heads=(6, 5, 3),
    ),
    "gpt_bigcode-mha": Case(
        lambda: tf.GPTBigCodeConfig(**_gpt_like(multi_query=False)), "GPTBigCode", ("ForCausalLM",), heads=(6, 5, 3)
    ),
    "gpt_neox": Case(
        lambda: tf.GPTNeoXConfig(**_bert_like(bos_token_id=2, eos_token_id=None)), "GPTNeoX", _DECODER, heads=(6, 5, 3)
    ),
    "llama": Case(lambda: tf.LlamaConfig(**_llama_like()), "Llama", _DECODER),
    "llama-tied": Case(lambda: tf.LlamaConfig(**_llama_like(tie_word_embeddings=True)), "Llama", ("ForCausalLM",)),
    "llama-mqa": Case(
        lambda: tf.LlamaConfig(**(_llama_like() | {"num_key_value_heads": 1})), "Llama", ("ForCausalLM",), (6, 5, 3)
    ),
    "mistral": Case(lambda: tf.MistralConfig(**_llama_like(sliding_window=5)), "Mistral", _DECODER),
    "qwen2": Case(
        lambda: tf.Qwen2Config(**_llama_like(use_sliding_window=True, sliding_window=5, max_window_layers=2)),
        "Qwen2",
        _DECODER,
    ),
    "qwen3": Case(lambda: tf.Qwen3Config(**_llama_like(head_dim=10)), "Qwen3", _DECODER),
}


def all_models() -> list[tuple[str, str]]:
    """Lists (case, class suffix) of every family and head."""
    return [(name, suffix) for name, case in CASES.items() for suffix in case.classes]


def make(name: str, suffix: str, seed: int = 0, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Makes a model with weights random enough that every part of it matters (norms and biases too)."""
    torch.manual_seed(seed)
    case = CASES[name]
    model = getattr(tf, case.name + suffix)(case.config()).to(dtype).eval()
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data += torch.randn_like(parameter) * 0.1
        else:
            parameter.data.copy_(torch.randn_like(parameter) * parameter.shape[-1] ** -0.5)
    return model


def inputs(side: str = "right", seed: int = 0) -> dict[str, torch.Tensor]:
    """Draws token ids (3, 11) with padding on one side, and makes their mask."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCABULARY, (BATCH, LENGTH), generator=generator)
    mask = torch.ones_like(ids)
    for row, count in enumerate((0, 3, 6)):
        span = slice(LENGTH - count, LENGTH) if side == "right" else slice(0, count)
        ids[row, span], mask[row, span] = PAD, 0
    return {"input_ids": ids, "attention_mask": mask}


def logits_of(output: Any) -> torch.Tensor:
    """Returns the output's logits; for question answering those of both ends, stacked."""
    return output.logits if "logits" in output else torch.stack([output.start_logits, output.end_logits], -1)
