"""What of a batch the model itself takes."""

import inspect
from collections.abc import Iterable, Mapping
from typing import Any

from transformers import PreTrainedModel
from transformers.utils import find_labels

from mlfs.supernet.targets import LABELS


def without_labels(
    model: PreTrainedModel, inputs: Mapping[str, Any], label_names: Iterable[str] = ()
) -> dict[str, Any]:
    """Returns what the forward pass of a model names as its own of a batch, without labels.

    A loss of somebody's own may understand labels, and what else a batch has, in another way than the model does.

    Args:
        label_names: what the Trainer takes for labels, beside the model's own.
    """
    labels = {*LABELS, *find_labels(type(model)), *label_names}
    kinds = {name: parameter.kind for name, parameter in inspect.signature(type(model).forward).parameters.items()}
    takes = {name for name, kind in kinds.items() if kind in (kind.POSITIONAL_OR_KEYWORD, kind.KEYWORD_ONLY)}
    takes.discard("self")
    if not takes:  # a forward pass that hands on what it gets
        takes = set(inputs)
    return {name: value for name, value in inputs.items() if name in takes and name not in labels}
