"""Files and Hub data sets to batches, and the metrics of a task.

Its names load on first use: reading data needs `datasets`, which a machine that only trains on tensors may lack.
"""

import importlib
from typing import Any

_PLACES = {
    "DataArguments": "mlfs.data.arguments",
    "RawData": "mlfs.data.prepare",
    "collator": "mlfs.data.tokens",
    "load_raw": "mlfs.data.prepare",
    "prepare": "mlfs.data.prepare",
    "tokenize": "mlfs.data.tokens",
}
__all__ = list(_PLACES)


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module 'mlfs.data' has no attribute {name!r}")
    return getattr(importlib.import_module(_PLACES[name]), name)
