"""Decoders like GPT: GPT-2, GPT-BigCode, GPT-NeoX."""

from mlfs.models.families.spec import (
    DECODER_HEADS,
    MLP,
    TASK,
    TO_VOCABULARY,
    Embedding,
    Family,
    FusedBlock,
    HeadCount,
    LayerNorm,
    Linear,
    Module,
    PreNorm,
)

_GPT2_OUTER: dict[str, Module] = {"wte": Embedding(), "wpe": Embedding(), "ln_f": LayerNorm()}
_GPT2_FUSED: dict[str, FusedBlock] = {
    "mlp": MLP("c_fc", "act", "c_proj", "dropout"),
    "": PreNorm("ln_1", "attn", "ln_2", "mlp", attention_adds=False),
}
_GPT2_HEADS: dict[str, Module] = DECODER_HEADS | {"classifier": TASK}


def _gpt2_layer(c_attn: Linear) -> dict[str, Module]:
    return {
        "ln_1": LayerNorm(),
        "attn.c_attn": c_attn,
        "attn.c_proj": Linear("heads", "hidden"),
        "ln_2": LayerNorm(),
        "mlp.c_fc": Linear("hidden", "ffn"),
        "mlp.c_proj": Linear("ffn", "hidden"),
    }


GPT_FAMILIES: tuple[Family, ...] = (
    Family(
        "gpt2",
        layers="h",
        layer=_gpt2_layer(Linear("hidden", ("heads", "heads", "heads"))),
        fused=_GPT2_FUSED,
        outer=_GPT2_OUTER,
        heads=_GPT2_HEADS,
        head_counts={
            "attn.split_size": HeadCount("heads", times_head_dim=True),
            "attn.embed_dim": HeadCount("heads", times_head_dim=True),
            "attn.num_heads": HeadCount("heads"),
        },
        ffn_field="n_inner",
        unsupported={"scale_attn_by_inverse_layer_idx": (True, "its attention depends on the number of the layer")},
    ),
    Family(
        "gpt_bigcode",
        when={"multi_query": True},
        layers="h",
        layer=_gpt2_layer(Linear("hidden", ("heads", "kv_heads", "kv_heads"))),
        fused=_GPT2_FUSED,
        outer=_GPT2_OUTER,
        heads=_GPT2_HEADS,
        head_counts={
            "attn.embed_dim": HeadCount("heads", times_head_dim=True),
            "attn.num_heads": HeadCount("heads"),
            "attn.num_key_value_groups": HeadCount("group"),
        },
        ffn_field="n_inner",
        kv_heads=1,
    ),
    Family(
        "gpt_bigcode",
        when={"multi_query": False},
        layers="h",
        layer=_gpt2_layer(Linear("hidden", "heads", per_head=3)),
        fused=_GPT2_FUSED,
        outer=_GPT2_OUTER,
        heads=_GPT2_HEADS,
        head_counts={"attn.num_heads": HeadCount("heads"), "attn.embed_dim": HeadCount("heads", times_head_dim=True)},
        ffn_field="n_inner",
    ),
    Family(
        "gpt_neox",
        layers="layers",
        layer={
            "input_layernorm": LayerNorm(),
            "attention.query_key_value": Linear("hidden", "heads", per_head=3),
            "attention.dense": Linear("heads", "hidden"),
            "post_attention_layernorm": LayerNorm(),
            "mlp.dense_h_to_4h": Linear("hidden", "ffn"),
            "mlp.dense_4h_to_h": Linear("ffn", "hidden"),
        },
        fused={"mlp": MLP("dense_h_to_4h", "act", "dense_4h_to_h")},
        outer={"embed_in": Embedding(), "final_layer_norm": LayerNorm()},
        heads={
            "lm_head": TO_VOCABULARY,
            "embed_out": TO_VOCABULARY,  # its name in earlier releases of transformers
            "score": TASK,
            "classifier": TASK,
            "qa_outputs": TASK,
        },
    ),
)
