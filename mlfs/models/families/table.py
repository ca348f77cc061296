"""The table of model families. Its entries are in the files beside this one, a file for each kin of families."""

from typing import Any

from mlfs.errors import MLFSError
from mlfs.models.families.bert import BERT_FAMILIES
from mlfs.models.families.gpt import GPT_FAMILIES
from mlfs.models.families.llama import LLAMA_FAMILIES
from mlfs.models.families.spec import Family

FAMILIES: tuple[Family, ...] = (*BERT_FAMILIES, *GPT_FAMILIES, *LLAMA_FAMILIES)


def family_of(config: Any) -> Family:
    """Finds the entry for a configuration.

    Raises:
        MLFSError: no entry fits (the message names the families there are), or the configuration has a value that is
            not supported.
    """
    model_type = getattr(config, "model_type", type(config).__name__)
    for family in FAMILIES:
        if family.model_type != model_type:
            continue
        if any(getattr(config, key, None) != value for key, value in family.when.items()):
            continue
        for key, (value, reason) in family.unsupported.items():
            if getattr(config, key, None) == value:
                raise MLFSError(f"{model_type} with {key}={value} cannot be made elastic: {reason}")
        return family
    known = ", ".join(sorted({family.model_type for family in FAMILIES}))
    raise MLFSError(f"model family {model_type!r} is not in the table: expected one of {known}; see 'Add a family'")
