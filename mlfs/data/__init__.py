"""Files and Hub data sets to batches, and the metrics of a task.

Its names load on first use: reading data needs `datasets`, which a machine that only trains on tensors may lack.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mlfs.data.arguments import TASKS as TASKS
    from mlfs.data.arguments import DataArguments as DataArguments
    from mlfs.data.raw import RawData as RawData
    from mlfs.data.raw import load_raw as load_raw
    from mlfs.data.raw import prepare as prepare
    from mlfs.data.tokens import collator as collator
    from mlfs.data.tokens import tokenize as tokenize

# No name here may be that of a file in this folder: once imported, the file would hide it.
_PLACES = {
    "DataArguments": "mlfs.data.arguments",
    "RawData": "mlfs.data.raw",
    "TASKS": "mlfs.data.arguments",
    "collator": "mlfs.data.tokens",
    "load_raw": "mlfs.data.raw",
    "prepare": "mlfs.data.raw",
    "tokenize": "mlfs.data.tokens",
}
__all__ = list(_PLACES)


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module 'mlfs.data' has no attribute {name!r}")
    return getattr(importlib.import_module(_PLACES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_PLACES])
