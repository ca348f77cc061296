"""Models, sizes and batches of `bench.speed.cpu_step`: MiniLM as the encoder, SmolLM2 as the decoder."""

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel

from mlfs import SearchSpace, Subnet, SuperTransformer
from mlfs.elastic.linear import ElasticLinear
from mlfs.models.pretrained import MINILM, SMOLLM2, find_model
from mlfs.space.search_space import evenly_spaced

ENCODER_LAYERS, DECODER_LAYERS = tuple(range(6)), tuple(range(30))
ENCODER = SearchSpace(
    hidden=(384, 288, 192),
    heads=(12, 9, 6),
    ffn=(1536, 1152, 768),
    layers=(ENCODER_LAYERS, (0, 2, 4)),
)
ENCODER_SUBNETS = (
    Subnet(384, 12, 1536, ENCODER_LAYERS),
    Subnet(288, 9, 1152, ENCODER_LAYERS),
    Subnet(192, 6, 768, ENCODER_LAYERS),
    Subnet(192, 6, 768, (0, 2, 4)),
)
DECODER = SearchSpace(
    hidden=(576, 384),
    heads=(9, 6),
    ffn=(1536, 1024),
    layers=(DECODER_LAYERS, evenly_spaced(30, 20)),
)
DECODER_SUBNETS = tuple(
    Subnet(hidden, heads, ffn, layers)
    for layers in DECODER.layers
    for hidden, heads, ffn in zip(DECODER.hidden, DECODER.heads, DECODER.ffn, strict=True)
)


def load(model: str) -> PreTrainedModel:
    """Loads the "encoder" or the "decoder" in fp32."""
    if model == "encoder":
        return AutoModelForSequenceClassification.from_pretrained(find_model(MINILM), dtype=torch.float32)
    return AutoModelForCausalLM.from_pretrained(find_model(SMOLLM2), dtype=torch.float32)


def supernet_of(model: str) -> SuperTransformer:
    """Makes the "encoder" or the "decoder" elastic, with its space."""
    return SuperTransformer(load(model), ENCODER if model == "encoder" else DECODER)


def with_stages(supernet: SuperTransformer) -> SuperTransformer:
    """Gives all three stages an effect, as training would."""
    for stage in range(supernet.stages):
        supernet.train_stage(stage)
    for module in supernet.elastic():
        if isinstance(module, ElasticLinear):
            for b in module.lora_B:
                b.data.normal_(std=0.01)
    supernet.train_stage(None)
    return supernet


def encoder_batch(rows: int = 32, longest: int = 64) -> dict[str, Tensor]:
    """Makes `rows` sentences of 6 to `longest` tokens, padded to `longest`, each with one of two labels."""
    lengths = torch.linspace(6, longest, rows).long()
    mask = (torch.arange(longest) < lengths[:, None]).long()  # (rows, longest)
    return {
        "input_ids": torch.randint(1000, 30000, (rows, longest)) * mask,
        "attention_mask": mask,
        "labels": torch.randint(0, 2, (rows,)),
    }


def decoder_batch() -> dict[str, Tensor]:
    """Makes 4 texts of 256 tokens, without padding, each its own label."""
    ids = torch.randint(1000, 40000, (4, 256))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


def one_sentence(tokens: int = 16) -> dict[str, Tensor]:
    """Makes one sentence without a label."""
    ids = torch.randint(1000, 30000, (1, tokens))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
