"""mlfs: train one transformer once, deploy it at any size.

Heavy modules load on first use, so that importing the package (and `mlfs --help`) stays quick.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mlfs.elastic.embedding import ElasticEmbedding as ElasticEmbedding
    from mlfs.elastic.linear import ElasticLinear as ElasticLinear
    from mlfs.elastic.norm import ElasticLayerNorm as ElasticLayerNorm
    from mlfs.elastic.norm import ElasticRMSNorm as ElasticRMSNorm
    from mlfs.elastic.staged import train_stage as train_stage
    from mlfs.errors import MLFSError as MLFSError
    from mlfs.models.fused.padding import without_padding as without_padding
    from mlfs.space.search_space import SearchSpace as SearchSpace
    from mlfs.space.subnet import Subnet as Subnet
    from mlfs.supernet.model import SuperTransformer as SuperTransformer
    from mlfs.training.arguments import MLFSArguments as MLFSArguments
    from mlfs.training.trainer import MLFSTrainer as MLFSTrainer

__version__ = "0.1.0"

_PLACES = {
    "ElasticEmbedding": "mlfs.elastic",
    "ElasticLayerNorm": "mlfs.elastic",
    "ElasticLinear": "mlfs.elastic",
    "ElasticRMSNorm": "mlfs.elastic",
    "MLFSArguments": "mlfs.training.arguments",
    "MLFSError": "mlfs.errors",
    "MLFSTrainer": "mlfs.training.trainer",
    "SearchSpace": "mlfs.space.search_space",
    "Subnet": "mlfs.space.subnet",
    "SuperTransformer": "mlfs.supernet",
    "train_stage": "mlfs.elastic",
    "without_padding": "mlfs.models.fused.padding",
}
__all__ = ["__version__", *_PLACES]


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module 'mlfs' has no attribute {name!r}")
    return getattr(importlib.import_module(_PLACES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_PLACES])
