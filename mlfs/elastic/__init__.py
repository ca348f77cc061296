"""Elastic layers: drop-in replacements that read the leading slice of a frozen layer's weights.

Each shares the storage of the layer it was made from. How much it reads follows from its input (columns), and from an
argument or the active subnet (rows). They work in any PyTorch model; `SuperTransformer` places them in a Hugging Face
model and binds them to its subnets.
"""

from mlfs.elastic.base import Elastic
from mlfs.elastic.embedding import ElasticEmbedding
from mlfs.elastic.linear import ElasticLinear
from mlfs.elastic.norm import ElasticLayerNorm, ElasticNorm, ElasticRMSNorm
from mlfs.elastic.staged import train_stage

__all__ = [
    "Elastic",
    "ElasticEmbedding",
    "ElasticLayerNorm",
    "ElasticLinear",
    "ElasticNorm",
    "ElasticRMSNorm",
    "train_stage",
]
