"""Puts a saved super-transformer into one that is there, and checks the base that it is made on."""

from typing import Any

import torch
from transformers import PreTrainedModel

from mlfs.elastic.base import Elastic
from mlfs.elastic.staged import Staged
from mlfs.errors import MLFSError
from mlfs.supernet.base import as_in_base, check_config, check_constants, config_as_loaded, constants
from mlfs.supernet.checkpoint import SavedState
from mlfs.supernet.fingerprint import Fingerprint, check_base, fingerprint
from mlfs.supernet.permutation import difference


def check_whole_base(model: PreTrainedModel, state: SavedState, place: object) -> Fingerprint:
    """Checks that `model` is the base that a saved super-transformer was trained on: weights, and what else computes.

    Args:
        model: as yet a plain one. place: where the run is, for the message.

    Returns:
        Its fingerprint.

    Raises:
        MLFSError: it is another one.
    """
    given = type(model).__name__
    if given != state.architecture:
        raise MLFSError(f"{place} was trained on a {state.architecture}, the base given is a {given}")
    # What belongs to the run, such as a task head, does not count in the base at hand.
    owned = set(state.owned)
    base = {
        name: parameter
        for name, parameter in model.named_parameters()
        if name in state.fingerprint or not owned & {name, name.rpartition(".")[0]}
    }
    kept = min(state.vocabulary, state.config["vocab_size"]) if state.vocabulary else None
    found = fingerprint(as_in_base(base, model, kept))
    check_base(found, state.fingerprint, model.dtype, state.base_name, place)
    check_config(model.config.to_dict(), state.config, place)
    check_constants(constants(model), state.constants, model.dtype, place)
    return found


def check_same(supernet: Any, state: SavedState, place: object) -> Fingerprint:
    """Checks that a saved super-transformer has the base, space and rank of the one that is there.

    Returns:
        The fingerprint of the base, without what the saved one owns.

    Raises:
        MLFSError: it has others.
    """
    saved = {"space": state.space, "rank": state.rank, "stages": state.stages, "alpha": state.alpha}
    own = {"space": supernet.space.to_dict(), **{key: getattr(supernet, key) for key in ("rank", "stages", "alpha")}}
    if odd := [key for key in own if saved[key] != own[key]]:
        raise MLFSError(f"{place} was saved with another {', '.join(odd)}: resume with the options of that run")
    found = without_owned(supernet.fingerprint(), state)
    trained = supernet.own_parameters().keys() & supernet.fingerprint().keys()
    if lost := sorted(name for name in trained if not {name, name.rpartition(".")[0]} & set(state.owned)):
        raise MLFSError(
            f"{lost[0]} of the base has trained here, and {place} was saved before it did: restore that into a "
            "super-transformer of the base loaded anew"
        )
    check_base(found, state.fingerprint, supernet.model.dtype, state.base_name, place)
    check_config(config_as_loaded(supernet), state.config, place)
    check_constants(supernet.base_constants, state.constants, supernet.model.dtype, place)
    return found


def without_owned(found: Fingerprint, state: SavedState) -> Fingerprint:
    """Leaves out of a base's fingerprint what a saved super-transformer owns, and so brings with it."""
    owned = set(state.owned)
    return {
        name: hashes
        for name, hashes in found.items()
        if name in state.fingerprint or not owned & {name, name.rpartition(".")[0]}
    }


def restore_order(supernet: Any, state: SavedState, place: object) -> None:
    """Rotates the residual stream and orders the units as in a saved super-transformer of the same base.

    Args:
        place: where the run is, for the message.

    Raises:
        MLFSError: `supernet` is rotated already, and not as in `state`, which cannot be undone; nothing has changed.
    """
    have, want = supernet.rotation, state.rotation
    if have is not None and (want is None or not torch.equal(have, want)):
        raise MLFSError(
            f"the residual stream is rotated already, in {place} {'not' if want is None else 'by another matrix'}: "
            "restore into a super-transformer of the base loaded anew"
        )
    if want is not None and have is None:
        if supernet.permutation:  # the matrix is for the base's own order
            supernet.apply_permutation(difference(supernet.permutation, {}))
        supernet.apply_rotation(want)
    if state.permutation != supernet.permutation:
        supernet.apply_permutation(difference(supernet.permutation, state.permutation))
        supernet.permutation = state.permutation


def load_parameters(supernet: Any, state: SavedState, place: object) -> None:
    """Copies saved parameters into the super-transformer's own.

    Args:
        supernet: with units in the order that `state` has.
        place: where the run is, for the message.

    Raises:
        MLFSError: a tensor is missing or left over, or has another shape.
    """
    for name, module in supernet.model.named_modules():
        if isinstance(module, Elastic):
            module.owned = name in state.owned
            if isinstance(module, Staged):
                module.trained_stages = min(module.stages, state.trained_stages)
    names = {name for name, _ in supernet.model.named_parameters()}
    supernet.new_parameters = {name for name in state.owned if name in names}
    own, saved = supernet.own_parameters() | supernet.added_rows(), state.parameters
    if own.keys() != saved.keys():
        odd = sorted(own.keys() ^ saved.keys())
        raise MLFSError(f"{place} does not fit the model: {len(odd)} tensors are missing or left over, e.g. {odd[0]}")
    with torch.no_grad():
        for name, parameter in own.items():
            if parameter.shape != saved[name].shape:
                found, expected = tuple(saved[name].shape), tuple(parameter.shape)
                raise MLFSError(f"{place}: tensor {name} has shape {found}, the model has {expected}")
            parameter.copy_(saved[name])
    if (problem_type := state.config.get("problem_type")) is not None:
        supernet.config.problem_type = problem_type  # which transformers deduces from the first labels it sees
    supernet.merge_stages(supernet.merged_stages)  # the merged copies are made anew, of what was loaded
    supernet.record.write()
