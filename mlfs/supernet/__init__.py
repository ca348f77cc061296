"""A Hugging Face model whose sub-networks share its weights: the model, its order of units, and how it is saved."""

from mlfs.supernet.model import SuperTransformer

__all__ = ["SuperTransformer"]
