"""A Hugging Face model whose subnets share its weights: the model, the order of its units, and how it is saved."""

from mlfs.supernet.model import SuperTransformer

__all__ = ["SuperTransformer"]
