"""What a base brought with it, and what else but its parameters it computes with."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import logging

from mlfs.errors import MLFSError
from mlfs.models.pretrained import load_base
from mlfs.supernet.fingerprint import FINGERPRINT_DTYPES, fingerprint

logger = logging.get_logger("transformers.mlfs")

# Fields of a configuration that do not change what a forward pass without dropout computes from the same weights.
_IDLE = {
    "_attn_implementation", "_attn_implementation_internal", "_name_or_path", "architectures", "attn_implementation",
    "auto_map", "bos_token_id", "chunk_size_feed_forward", "classifier_dropout", "decoder_start_token_id", "dtype",
    "eos_token_id", "finetuning_task", "gradient_checkpointing", "id2label", "initializer_factor", "initializer_range",
    "label2id", "name_or_path", "num_labels", "output_attentions", "output_hidden_states", "prefix",
    "problem_type", "return_dict", "sep_token_id", "task_specific_params", "tokenizer_class", "torch_dtype",
    "torchscript", "transformers_version", "use_cache", "vocab_size",
}  # fmt: skip
_MOVING = ("dynamic", "longrope")  # kinds of rotary embedding whose frequencies change with the length of what they see


def new_parameters(model: PreTrainedModel) -> set[str]:
    """Names the parameters that the checkpoint did not have, which loading drew at random.

    transformers marks what it has loaded. Of a model without any mark (made from its configuration, or a copy) nothing
    is known: all of it counts as the base's.
    """
    unmarked = {name for name, p in model.named_parameters() if not getattr(p, "_is_hf_initialized", False)}
    return unmarked if len(unmarked) < sum(1 for _ in model.parameters()) else set()


def vocabulary_of_base(model: PreTrainedModel) -> int | None:
    """Finds how many tokens the base had, if `model` has more or fewer since its embeddings were resized.

    Reads the configuration in the folder, or among the Hub's files that are here already, that it was loaded from.

    Returns:
        None if it is as many as `model` has, or cannot be known.
    """
    name = model.name_or_path
    if not name or not hasattr(model.config, "vocab_size"):
        return None
    revision = None if Path(name).is_dir() else getattr(model.config, "_commit_hash", None)
    try:
        config, _ = type(model.config).get_config_dict(name, revision=revision, local_files_only=True)
    except (OSError, ValueError):
        return None
    count = config.get("vocab_size")
    return count if isinstance(count, int) and count != _tokens(model) else None


def vocabulary_parameters(model: PreTrainedModel) -> dict[str, Tensor]:
    """Collects the parameters with a row for each token, by name; each tied one once."""
    count = _tokens(model)
    ends = [module for module in (model.get_input_embeddings(), model.get_output_embeddings()) if module is not None]
    ids = {id(p) for module in ends for p in module.parameters(recurse=False)}
    return {name: p for name, p in model.named_parameters() if id(p) in ids and p.shape[0] == count}


def _tokens(model: PreTrainedModel) -> int:
    """Counts the rows of the input embeddings."""
    embeddings: Any = model.get_input_embeddings()
    return embeddings.weight.shape[0]  # type: ignore[no-any-return]


def as_in_base(parameters: Mapping[str, Tensor], model: PreTrainedModel, vocabulary: int | None) -> dict[str, Tensor]:
    """Cuts what has a row for each token to the rows that the base had."""
    resized = vocabulary_parameters(model) if vocabulary else {}
    return {name: p[:vocabulary] if name in resized else p for name, p in parameters.items()}


def token_ids(config: Mapping[str, Any]) -> dict[str, int]:
    """Collects the tokens that a configuration names, such as the one for padding."""
    return {name: i for name, i in config.items() if name.endswith("_token_id") and isinstance(i, int)}


def config_of_base(config: Mapping[str, Any], vocabulary: int | None) -> dict[str, Any]:
    """Makes the configuration that the base's own checkpoint loads under, of that of the model.

    Args:
        vocabulary: how many tokens the base has; None if it is as many as the model.
    """
    if vocabulary is None:
        return dict(config)
    beyond = {name: None for name, i in token_ids(config).items() if i >= vocabulary}
    return {**config, **beyond, "vocab_size": vocabulary}


def config_as_loaded(supernet: Any) -> dict[str, Any]:
    """Makes the configuration of a super-transformer's base, whose head was tied, perhaps, before it was rotated."""
    config = supernet.model.config.to_dict()
    return config if supernet.base_ties is None else {**config, "tie_word_embeddings": supernet.base_ties}


# ---- what is not as it was loaded -----------------------------------------------------------------------------------


def changed_parameters(supernet: Any) -> set[str]:
    """Names the base's parameters that are not as where the base is recorded to come from, and says so in a warning.

    They were changed in memory: adapters were merged, a step was taken, weights that loading drew lost their mark in a
    copy. Whoever loads the base again would not have them. Units must be in their first order, and not rotated.

    Returns:
        None of them where there is nothing to compare with: the base has no name, or is not on this machine.
    """
    ours = supernet.base_parameters()
    is_whole = all(type(p) is nn.Parameter and not p.is_meta for p in ours.values())  # no shards
    is_ordered = supernet.permutation or supernet.rotation is not None
    if not supernet.base_name or is_ordered or not is_whole:
        return set()
    plain = _base_again(supernet)
    if plain is None:
        return set()
    theirs, new = dict(plain.named_parameters()), new_parameters(plain)
    resized = vocabulary_parameters(supernet.model) if supernet.base_vocabulary else {}
    changed = set()
    for name in ours.keys() & theirs.keys():
        one, other = ours[name].detach(), theirs[name].detach()
        if name in resized:
            count = min(len(one), len(other))
            one, other = one[:count], other[:count]
        # in the type of the one at hand: hashes are of what it holds
        if name in new or one.shape != other.shape or not torch.equal(one.cpu(), other.to(one.dtype)):
            changed.add(name)
    if changed:
        size = sum(ours[name].nbytes for name in changed) / 1e6
        logger.warning(
            f"{len(changed)} of {len(ours)} tensors of the base are not as in {supernet.base_name}, so they are saved "
            f"with the run ({size:.1f} MB): to keep it small, save the changed model to a folder of its own and load "
            "it from there before SuperTransformer(model)"
        )
    return changed


def _base_again(supernet: Any) -> PreTrainedModel | None:
    """Loads the recorded base once more, as a saved run would; None if it is not on this machine."""
    model = supernet.model
    config = config_of_base(model.config.to_dict(), supernet.base_vocabulary)
    revision = getattr(model.config, "_commit_hash", None)
    options = {"dtype": model.dtype, "local_files_only": True}
    shows_progress = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        with torch.random.fork_rng(devices=[]):  # what the checkpoint lacks is drawn
            name = type(model).__name__
            return load_base(supernet.base_name, revision, name, config, options, supernet.hub_name).cpu()
    except Exception:  # whatever is wrong with it: the run does not need it before it is loaded again
        return None
    finally:
        if shows_progress:
            logging.enable_progress_bar()


# ---- what is not a parameter ----------------------------------------------------------------------------------------


def constants(model: PreTrainedModel) -> dict[str, Any]:
    """Collects what a plain model computes with beside parameters and configuration.

    Returns:
        By name, of each buffer its hashes (`fingerprint`), and of each module its attributes that are floats, such as
        the epsilon of a norm; those of dropout are left out.
    """
    buffers = {}
    for name, module in model.named_modules():
        if getattr(module, "rope_type", "default") in _MOVING:
            continue
        for key, buffer in module.named_buffers(prefix=name, recurse=False):
            if not buffer.is_meta:
                buffers[key] = buffer
    found: dict[str, Any] = dict(fingerprint(buffers))
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            if isinstance(value, float) and value == value and not key.startswith("_") and not _is_dropout(key):
                found[f"{name}.{key}" if name else key] = value
    return found


def check_constants(found: Mapping[str, Any], saved: Mapping[str, Any], dtype: torch.dtype, place: object) -> None:
    """Raises MLFSError where two bases have one of their `constants` in common that is not the same.

    Args:
        found, saved: of the base at hand, and of the one that was trained on.
        dtype: in which the base at hand is loaded. place: where the run is, for the message.
    """
    column = FINGERPRINT_DTYPES.index(dtype) if dtype in FINGERPRINT_DTYPES else 0
    for name in sorted(found.keys() & saved.keys()):
        ours, theirs = found[name], saved[name]
        if isinstance(ours, list) and isinstance(theirs, list):
            if ours[column] != theirs[column]:
                raise MLFSError(
                    f"the base is not the one {place} was trained on: its buffer {name} has other numbers; load that "
                    "base as it was"
                )
        elif ours != theirs:
            raise MLFSError(
                f"the base is not the one {place} was trained on: its {name} is {ours}, there it was {theirs}; load "
                "that base as it was"
            )


def check_config(found: Mapping[str, Any], saved: Mapping[str, Any], place: object) -> None:
    """Raises MLFSError where two configurations differ in a field that changes what is computed.

    Fields that one of them does not have are passed over: releases of transformers add and rename some.

    Args:
        found, saved: of the base at hand, and of the one that was trained on.
        place: where the run is, for the message.
    """
    for name, ours, theirs in _differences(found, saved):
        raise MLFSError(
            f"the base is not the one {place} was trained on: its configuration has {name}={ours!r}, there it was "
            f"{theirs!r}; load it with that configuration"
        )


def _differences(
    found: Mapping[str, Any], saved: Mapping[str, Any], prefix: str = ""
) -> Iterable[tuple[str, Any, Any]]:
    """Yields the fields that both have, with both values, where they differ."""
    for name in sorted(found.keys() & saved.keys()):
        ours, theirs = found[name], saved[name]
        if name in _IDLE or _is_dropout(name):
            continue
        if name == "pad_token_id" and None in (ours, theirs):  # training sets one where there is none
            continue
        if isinstance(ours, Mapping) and isinstance(theirs, Mapping):
            yield from _differences(ours, theirs, f"{prefix}{name}.")
        elif _plain(ours) != _plain(theirs):
            yield prefix + name, ours, theirs


def _plain(value: Any) -> Any:
    """A value as JSON keeps it."""
    return list(value) if isinstance(value, tuple) else value


def _is_dropout(name: str) -> bool:
    return name == "p" or "drop" in name
