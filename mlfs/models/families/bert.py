"""Encoders like BERT: BERT, RoBERTa, DistilBERT."""

from mlfs.models.families.spec import (
    DENSE,
    TASK,
    TASK_DENSE,
    TO_VOCABULARY,
    Activated,
    AddNorm,
    Embedding,
    Family,
    Fixed,
    FusedBlock,
    LayerNorm,
    Linear,
    Module,
    PostNorm,
    SelfAttention,
)

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
_BERT_FUSED: dict[str, FusedBlock] = {
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

BERT_FAMILIES: tuple[Family, ...] = (
    Family(
        "bert",
        layers="encoder.layer",
        layer=_BERT_LAYER,
        fused=_BERT_FUSED,
        encoder="encoder",
        outer=_BERT_OUTER,
        heads={
            "classifier": TASK,
            "qa_outputs": TASK,
            "cls.predictions.transform.dense": DENSE,
            "cls.predictions.transform.LayerNorm": LayerNorm(),
            "cls.predictions.decoder": TO_VOCABULARY,
            "cls.predictions": Fixed(),  # holds the decoder's bias
        },
    ),
    Family(
        "roberta",
        layers="encoder.layer",
        layer=_BERT_LAYER,
        fused=_BERT_FUSED,
        encoder="encoder",
        outer=_BERT_OUTER,
        heads={
            "classifier": TASK,
            "classifier.dense": TASK_DENSE,
            "classifier.out_proj": TASK,
            "qa_outputs": TASK,
            "lm_head.dense": DENSE,
            "lm_head.layer_norm": LayerNorm(),
            "lm_head.decoder": TO_VOCABULARY,
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
            "pre_classifier": TASK_DENSE,
            "classifier": TASK,
            "qa_outputs": TASK,
            "vocab_transform": DENSE,
            "vocab_layer_norm": LayerNorm(),
            "vocab_projector": TO_VOCABULARY,
        },
        ffn_field="hidden_dim",
    ),
)
