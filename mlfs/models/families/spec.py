"""The words a family's table entry is written in: where its layers are, and which axis each module follows.

To add a family, add an entry to a file beside this one (guide: docs/add_a_family.md). Nothing about a family is written
anywhere else. Names are relative to the base model (`model.base_model`), except those of `heads`, relative to the whole
model.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Axis = Literal["hidden", "heads", "kv_heads", "ffn"]


@dataclass(frozen=True)
class Linear:
    """A projection (nn.Linear or Conv1D).

    Attributes:
        reads: the axis that its input follows. writes: that of its output, or one for each part of a fused projection.
            None: the width is fixed.
        adapter: whether it has low-rank stages.
        task: whether it is new for the task: it then trains in full, without adapters, and is saved with the run.
        per_head: how often an output along heads or kv_heads has head_dim numbers for each head: 3 where a head's
            query, key and value lie side by side.
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
class HeadCount:
    """A module's attribute that counts attention heads of the active subnet.

    Attributes:
        axis: query heads ("heads"), key-value heads ("kv_heads") or query heads per key-value head ("group").
        times_head_dim: whether it counts the numbers that the heads span instead.
    """

    axis: Literal["heads", "kv_heads", "group"]
    times_head_dim: bool = False


Module = Linear | Embedding | LayerNorm | RMSNorm | Fixed


@dataclass(frozen=True)
class Activated:
    """A fused block that is activation(linear(x))."""

    linear: str
    activation: str


@dataclass(frozen=True)
class MLP:
    """A fused block that is dropout(down(activation(up(x)))), with or without the dropout."""

    up: str
    activation: str
    down: str
    dropout: str = ""


@dataclass(frozen=True)
class GatedMLP:
    """A fused block that is down(activation(gate(x)) · up(x))."""

    gate: str
    activation: str
    up: str
    down: str


@dataclass(frozen=True)
class AddNorm:
    """A fused block of two inputs, x and residual, that is norm(dropout(linear(x)) + residual)."""

    linear: str
    dropout: str
    norm: str


@dataclass(frozen=True)
class PreNorm:
    """A fused block, the whole layer, that is s + mlp(mlp_norm(s)) for s = x + attention(norm(x)).

    Its `mlp` is a fused block, a GatedMLP or an MLP. `attention_adds`: whether its attention is a fused block, which
    adds x itself; else it is the model's own.
    """

    norm: str
    attention: str
    mlp_norm: str
    mlp: str
    attention_adds: bool = True


@dataclass(frozen=True)
class PostNorm:
    """A fused block, the whole layer, that is last_norm(t + down(activation(up(t)))) for
    t = norm(x + attention_out(attention(x))).

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
    """A fused block that is attention both ways between linear projections of x, scaled, with dropout; heads side by
    side.

    Its module has the attributes `attention_head_size` and `scaling`.
    """

    query: str
    key: str
    value: str
    dropout: str


@dataclass(frozen=True)
class RotaryAttention:
    """A fused block that is causal attention between linear projections of x, with rotary embeddings by halves, and a
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


FusedBlock = SelfAttention | RotaryAttention | Activated | MLP | GatedMLP | AddNorm | PreNorm | PostNorm


@dataclass(frozen=True)
class Family:
    """One entry of the table.

    Attributes:
        model_type: of the configuration. `when`: configuration values the entry is for.
        layers: name of the list of layers. layer: the modules of a layer. outer: those beside the layers.
        heads: what the model's classes put on top of the base model (classifiers, projections to the vocabulary).
        head_counts: attributes of modules inside a layer that count attention heads, and so follow the active subnet.
        fused: parts of a layer ("" is all of it) that compute what a `FusedBlock` says, and so run fused; inner ones
            first. From the first that cannot (an activation that no operator knows), they run as they are.
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
    head_counts: Mapping[str, HeadCount] = field(default_factory=dict)
    fused: Mapping[str, FusedBlock] = field(default_factory=dict)
    encoder: str = ""
    when: Mapping[str, Any] = field(default_factory=dict)
    ffn_field: str = "intermediate_size"
    head_dim_field: bool = False
    heads_divide_hidden: bool = False
    kv_heads: int = 0
    unsupported: Mapping[str, tuple[Any, str]] = field(default_factory=dict)


TASK = Linear("hidden", None, adapter=False, task=True)
TASK_DENSE = Linear("hidden", "hidden", adapter=False, task=True)
TO_VOCABULARY = Linear("hidden", None, adapter=False)
DENSE = Linear("hidden", "hidden", adapter=False)
DECODER_HEADS: dict[str, Module] = {"lm_head": TO_VOCABULARY, "score": TASK, "qa_outputs": TASK}
