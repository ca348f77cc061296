"""Model families as data: where a family's layers are, and which axis each module's input and output follow.

To add one, add an entry to `FAMILIES` (guide: docs/add_a_family.md). Nothing about a family is written anywhere
else. Names are relative to the base model (`model.base_model`), except those of `heads`, relative to the whole model.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from mlfs.errors import MLFSError

Axis = Literal["hidden", "heads", "kv_heads", "ffn"]


@dataclass(frozen=True)
class Linear:
    """A projection (nn.Linear or Conv1D). `writes` is one axis, or one per part of a fused projection; None: fixed.

    A part along heads or kv_heads has head_dim numbers per head, times `per_head` where a head's query, key and value
    lie side by side. `task` marks a head that is new for the task: it trains in full, without adapters, and is saved.
    """

    reads: Axis | None
    writes: Axis | tuple[Axis, ...] | None
    adapter: bool = True
    task: bool = False
    per_head: int = 1


@dataclass(frozen=True)
class Embedding:
    """A table whose columns follow hidden."""


@dataclass(frozen=True)
class LayerNorm:
    """A LayerNorm over hidden."""


@dataclass(frozen=True)
class RMSNorm:
    """An RMSNorm over hidden."""


@dataclass(frozen=True)
class Fixed:
    """A module with parameters that no axis reaches (e.g. a norm over head_dim)."""


@dataclass(frozen=True)
class Count:
    """A module's attribute that holds a number of heads ("heads", "kv_heads"), or of query heads per key-value head
    ("group"); with `times_head_dim`, the numbers they span."""

    axis: Literal["heads", "kv_heads", "group"]
    times_head_dim: bool = False


Module = Linear | Embedding | LayerNorm | RMSNorm | Fixed


@dataclass(frozen=True)
class Activated:
    """A block that is activation(linear(x))."""

    linear: str
    activation: str


@dataclass(frozen=True)
class MLP:
    """A block that is dropout(down(activation(up(x)))), with or without the dropout."""

    up: str
    activation: str
    down: str
    dropout: str = ""


@dataclass(frozen=True)
class GatedMLP:
    """A block that is down(activation(gate(x)) · up(x))."""

    gate: str
    activation: str
    up: str
    down: str


@dataclass(frozen=True)
class AddNorm:
    """A block of two inputs, x and residual, that is norm(dropout(linear(x)) + residual)."""

    linear: str
    dropout: str
    norm: str


@dataclass(frozen=True)
class PreNorm:
    """A layer that is s + mlp(mlp_norm(s)) for s = x + attention(norm(x)); its mlp is a GatedMLP or an MLP.

    `attention_adds`: whether its attention is a block that adds x itself, else it is the model's own.
    """

    norm: str
    attention: str
    mlp_norm: str
    mlp: str
    attention_adds: bool = True


@dataclass(frozen=True)
class PostNorm:
    """A layer that is last_norm(t + down(activation(up(t)))) for t = norm(x + attention_out(attention(x))).

    There is dropout before both sums; its attention is a SelfAttention of the three projections. Its module has the
    attribute `chunk_size_feed_forward`.
    """

    attention: str
    query: str
    key: str
    value: str
    attention_dropout: str
    attention_out: str
    out_dropout: str
    norm: str
    up: str
    activation: str
    down: str
    down_dropout: str
    last_norm: str


@dataclass(frozen=True)
class SelfAttention:
    """A block that is attention both ways between linear projections of x, scaled, with dropout; heads side by side.

    Its module has the attributes `attention_head_size` and `scaling`.
    """

    query: str
    key: str
    value: str
    dropout: str


@dataclass(frozen=True)
class RotaryAttention:
    """A block that is causal attention between linear projections of x, with rotary embeddings by halves, and a
    projection of what comes out of it, as in Llama; with or without norms of query and key, and a sliding window.

    Its module has the attributes that transformers' attention functions read, and `config`, `head_dim`, `layer_idx`,
    `scaling` and `attention_dropout`. `window`: whose attribute `sliding_window` is; "": nobody's.
    """

    query: str
    key: str
    value: str
    out: str
    query_norm: str = ""
    key_norm: str = ""
    window: Literal["", "module", "config"] = ""


Block = SelfAttention | RotaryAttention | Activated | MLP | GatedMLP | AddNorm | PreNorm | PostNorm


@dataclass(frozen=True)
class Family:
    """One entry of the table.

    Attributes:
        model_type: of the configuration. `when`: configuration values the entry is for.
        layers: name of the list of layers. layer: its modules. outer: those beside it. heads: of the whole model.
        sizes: attributes of modules inside a layer that follow an axis.
        blocks: parts of a layer ("" is all of it) that compute what a `Block` says, and so run fused; inner ones first.
            From the first that cannot (an activation that no kernel knows), they run as they are.
        encoder: module that runs the layers, and nothing else, on hidden states and attention mask, where the layers
            attend by `SelfAttention`; sequences can then go through it without their padding.
        ffn_field: configuration field of the feed-forward size (its other fields have common names).
        head_dim_field: whether the configuration can hold a head size apart from hidden / heads.
        heads_divide_hidden: whether the configuration nevertheless refuses a hidden size that is no multiple of heads.
        kv_heads: number of key-value heads where the configuration has no `num_key_value_heads`; 0: as many as heads.
        unsupported: configuration values under which a slice would not be exact, with the reason.
    """

    model_type: str
    layers: str
    layer: Mapping[str, Module]
    outer: Mapping[str, Module]
    heads: Mapping[str, Module]
    sizes: Mapping[str, Count] = field(default_factory=dict)
    blocks: Mapping[str, Block] = field(default_factory=dict)
    encoder: str = ""
    when: Mapping[str, Any] = field(default_factory=dict)
    ffn_field: str = "intermediate_size"
    head_dim_field: bool = False
    heads_divide_hidden: bool = False
    kv_heads: int = 0
    unsupported: Mapping[str, tuple[Any, str]] = field(default_factory=dict)


_task = Linear("hidden", None, adapter=False, task=True)
_task_dense = Linear("hidden", "hidden", adapter=False, task=True)
_to_vocabulary = Linear("hidden", None, adapter=False)
_dense = Linear("hidden", "hidden", adapter=False)

_BERT_LAYER: dict[str, Module] = {
    "attention.self.query": Linear("hidden", "heads"),
    "attention.self.key": Linear("hidden", "heads"),
    "attention.self.value": Linear("hidden", "heads"),
    "attention.output.dense": Linear("heads", "hidden"),
    "attention.output.LayerNorm": LayerNorm(),
    "intermediate.dense": Linear("hidden", "ffn"),
    "output.dense": Linear("ffn", "hidden"),
    "output.LayerNorm": LayerNorm(),
}
_BERT_BLOCKS: dict[str, Block] = {
    "attention.self": SelfAttention("query", "key", "value", "dropout"),
    "attention.output": AddNorm("dense", "dropout", "LayerNorm"),
    "output": AddNorm("dense", "dropout", "LayerNorm"),
    "intermediate": Activated("dense", "intermediate_act_fn"),
    "": PostNorm(
        attention="attention.self",
        query="attention.self.query",
        key="attention.self.key",
        value="attention.self.value",
        attention_dropout="attention.self.dropout",
        attention_out="attention.output.dense",
        out_dropout="attention.output.dropout",
        norm="attention.output.LayerNorm",
        up="intermediate.dense",
        activation="intermediate.intermediate_act_fn",
        down="output.dense",
        down_dropout="output.dropout",
        last_norm="output.LayerNorm",
    ),
}
_BERT_OUTER: dict[str, Module] = {
    "embeddings.word_embeddings": Embedding(),
    "embeddings.position_embeddings": Embedding(),
    "embeddings.token_type_embeddings": Embedding(),
    "embeddings.LayerNorm": LayerNorm(),
    "pooler.dense": Linear("hidden", "hidden"),
}
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
_LLAMA_BLOCKS: dict[str, Block] = {
    "mlp": GatedMLP("gate_proj", "act_fn", "up_proj", "down_proj"),
    "": PreNorm("input_layernorm", "self_attn", "post_attention_layernorm", "mlp"),
}
_LLAMA_OUTER: dict[str, Module] = {"embed_tokens": Embedding(), "norm": RMSNorm()}
_LLAMA_HEADS: dict[str, Module] = {"lm_head": _to_vocabulary, "score": _task, "qa_outputs": _task}
_GPT2_OUTER: dict[str, Module] = {"wte": Embedding(), "wpe": Embedding(), "ln_f": LayerNorm()}
_GPT2_BLOCKS: dict[str, Block] = {
    "mlp": MLP("c_fc", "act", "c_proj", "dropout"),
    "": PreNorm("ln_1", "attn", "ln_2", "mlp", attention_adds=False),
}
_GPT2_HEADS: dict[str, Module] = _LLAMA_HEADS | {"classifier": _task}


def _gpt2_layer(c_attn: Linear) -> dict[str, Module]:
    return {
        "ln_1": LayerNorm(),
        "attn.c_attn": c_attn,
        "attn.c_proj": Linear("heads", "hidden"),
        "ln_2": LayerNorm(),
        "mlp.c_fc": Linear("hidden", "ffn"),
        "mlp.c_proj": Linear("ffn", "hidden"),
    }


def _llama(model_type: str, attention: RotaryAttention = _LLAMA_ATTENTION, heads_divide_hidden: bool = False) -> Family:
    norms = [name for name in (attention.query_norm, attention.key_norm) if name]
    return Family(
        model_type,
        layers="layers",
        layer=_LLAMA_LAYER | {f"self_attn.{name}": Fixed() for name in norms},
        outer=_LLAMA_OUTER,
        heads=_LLAMA_HEADS,
        sizes={"self_attn.num_key_value_groups": Count("group")},
        blocks={"self_attn": attention} | _LLAMA_BLOCKS,
        head_dim_field=True,
        heads_divide_hidden=heads_divide_hidden,
    )


FAMILIES: tuple[Family, ...] = (
    Family(
        "bert",
        layers="encoder.layer",
        layer=_BERT_LAYER,
        blocks=_BERT_BLOCKS,
        encoder="encoder",
        outer=_BERT_OUTER,
        heads={
            "classifier": _task,
            "qa_outputs": _task,
            "cls.predictions.transform.dense": _dense,
            "cls.predictions.transform.LayerNorm": LayerNorm(),
            "cls.predictions.decoder": _to_vocabulary,
            "cls.predictions": Fixed(),  # holds the decoder's bias
        },
    ),
    Family(
        "roberta",
        layers="encoder.layer",
        layer=_BERT_LAYER,
        blocks=_BERT_BLOCKS,
        encoder="encoder",
        outer=_BERT_OUTER,
        heads={
            "classifier": _task,
            "classifier.dense": _task_dense,
            "classifier.out_proj": _task,
            "qa_outputs": _task,
            "lm_head.dense": _dense,
            "lm_head.layer_norm": LayerNorm(),
            "lm_head.decoder": _to_vocabulary,
            "lm_head": Fixed(),
        },
    ),
    Family(
        "distilbert",
        layers="transformer.layer",
        layer={
            "attention.q_lin": Linear("hidden", "heads"),
            "attention.k_lin": Linear("hidden", "heads"),
            "attention.v_lin": Linear("hidden", "heads"),
            "attention.out_lin": Linear("heads", "hidden"),
            "sa_layer_norm": LayerNorm(),
            "ffn.lin1": Linear("hidden", "ffn"),
            "ffn.lin2": Linear("ffn", "hidden"),
            "output_layer_norm": LayerNorm(),
        },
        outer={
            "embeddings.word_embeddings": Embedding(),
            "embeddings.position_embeddings": Embedding(),
            "embeddings.LayerNorm": LayerNorm(),
        },
        heads={
            "pre_classifier": _task_dense,
            "classifier": _task,
            "qa_outputs": _task,
            "vocab_transform": _dense,
            "vocab_layer_norm": LayerNorm(),
            "vocab_projector": _to_vocabulary,
        },
        ffn_field="hidden_dim",
    ),
    Family(
        "gpt2",
        layers="h",
        layer=_gpt2_layer(Linear("hidden", ("heads", "heads", "heads"))),
        blocks=_GPT2_BLOCKS,
        outer=_GPT2_OUTER,
        heads=_GPT2_HEADS,
        sizes={
            "attn.split_size": Count("heads", times_head_dim=True),
            "attn.embed_dim": Count("heads", times_head_dim=True),
            "attn.num_heads": Count("heads"),
        },
        ffn_field="n_inner",
        unsupported={"scale_attn_by_inverse_layer_idx": (True, "its attention depends on the number of the layer")},
    ),
    Family(
        "gpt_bigcode",
        when={"multi_query": True},
        layers="h",
        layer=_gpt2_layer(Linear("hidden", ("heads", "kv_heads", "kv_heads"))),
        blocks=_GPT2_BLOCKS,
        outer=_GPT2_OUTER,
        heads=_GPT2_HEADS,
        sizes={
            "attn.embed_dim": Count("heads", times_head_dim=True),
            "attn.num_heads": Count("heads"),
            "attn.num_key_value_groups": Count("group"),
        },
        ffn_field="n_inner",
        kv_heads=1,
    ),
    Family(
        "gpt_bigcode",
        when={"multi_query": False},
        layers="h",
        layer=_gpt2_layer(Linear("hidden", "heads", per_head=3)),
        blocks=_GPT2_BLOCKS,
        outer=_GPT2_OUTER,
        heads=_GPT2_HEADS,
        sizes={"attn.num_heads": Count("heads"), "attn.embed_dim": Count("heads", times_head_dim=True)},
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
        blocks={"mlp": MLP("dense_h_to_4h", "act", "dense_4h_to_h")},
        outer={"embed_in": Embedding(), "final_layer_norm": LayerNorm()},
        heads={
            "lm_head": _to_vocabulary,
            "embed_out": _to_vocabulary,  # its name in earlier releases of transformers
            "score": _task,
            "classifier": _task,
            "qa_outputs": _task,
        },
    ),
    _llama("llama", heads_divide_hidden=True),
    _llama("mistral", replace(_LLAMA_ATTENTION, window="config")),
    _llama("qwen2", replace(_LLAMA_ATTENTION, window="module")),
    _llama("qwen3", replace(_LLAMA_ATTENTION, query_norm="q_norm", key_norm="k_norm", window="module")),
)


def family_of(config: Any) -> Family:
    """The entry for a configuration; MLFSError, naming the families there are, if none fits."""
    model_type = getattr(config, "model_type", type(config).__name__)
    for family in FAMILIES:
        if family.model_type == model_type and all(getattr(config, k, None) == v for k, v in family.when.items()):
            for key, (value, reason) in family.unsupported.items():
                if getattr(config, key, None) == value:
                    raise MLFSError(f"{model_type} with {key}={value} cannot be made elastic: {reason}")
            return family
    known = ", ".join(sorted({family.model_type for family in FAMILIES}))
    raise MLFSError(f"model family {model_type!r} is not in the table: expected one of {known}; see 'Add a family'")
