"""Decoders like Llama: Llama, Mistral, Qwen2, Qwen3."""

from dataclasses import replace

from mlfs.models.families.spec import (
    DECODER_HEADS,
    Embedding,
    Family,
    Fixed,
    FusedBlock,
    GatedMLP,
    HeadCount,
    Linear,
    Module,
    PreNorm,
    RMSNorm,
    RotaryAttention,
)

_LLAMA_LAYER: dict[str, Module] = {
    "input_layernorm": RMSNorm(),
    "self_attn.q_proj": Linear("hidden", "heads"),
    "self_attn.k_proj": Linear("hidden", "kv_heads"),
    "self_attn.v_proj": Linear("hidden", "kv_heads"),
    "self_attn.o_proj": Linear("heads", "hidden"),
    "post_attention_layernorm": RMSNorm(),
    "mlp.gate_proj": Linear("hidden", "ffn"),
    "mlp.up_proj": Linear("hidden", "ffn"),
    "mlp.down_proj": Linear("ffn", "hidden"),
}
_LLAMA_ATTENTION = RotaryAttention("q_proj", "k_proj", "v_proj", "o_proj")
_LLAMA_FUSED: dict[str, FusedBlock] = {
    "mlp": GatedMLP("gate_proj", "act_fn", "up_proj", "down_proj"),
    "": PreNorm("input_layernorm", "self_attn", "post_attention_layernorm", "mlp"),
}
_LLAMA_OUTER: dict[str, Module] = {"embed_tokens": Embedding(), "norm": RMSNorm()}


def _llama(model_type: str, attention: RotaryAttention = _LLAMA_ATTENTION, heads_divide_hidden: bool = False) -> Family:
    norms = [name for name in (attention.query_norm, attention.key_norm) if name]
    return Family(
        model_type,
        layers="layers",
        layer=_LLAMA_LAYER | {f"self_attn.{name}": Fixed() for name in norms},
        outer=_LLAMA_OUTER,
        heads=DECODER_HEADS,
        head_counts={"self_attn.num_key_value_groups": HeadCount("group")},
        fused={"self_attn": attention} | _LLAMA_FUSED,
        head_dim_field=True,
        heads_divide_hidden=heads_divide_hidden,
    )


LLAMA_FAMILIES: tuple[Family, ...] = (
    _llama("llama", heads_divide_hidden=True),
    _llama("mistral", replace(_LLAMA_ATTENTION, window="config")),
    _llama("qwen2", replace(_LLAMA_ATTENTION, window="module")),
    _llama("qwen3", replace(_LLAMA_ATTENTION, query_norm="q_norm", key_norm="k_norm", window="module")),
)
