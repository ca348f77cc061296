"""The table of model families; one file beside this one for each kin of them."""

from typing import Any

from mlfs.errors import MLFSError
from mlfs.models.families.bert import BERT_FAMILIES
from mlfs.models.families.gpt import GPT_FAMILIES
from mlfs.models.families.llama import LLAMA_FAMILIES
from mlfs.models.families.spec import Family

FAMILIES: tuple[Family, ...] = (*BERT_FAMILIES, *GPT_FAMILIES, *LLAMA_FAMILIES)


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
