"""The forward pass of a fused block."""

import functools
from operator import attrgetter
from typing import Any

from torch import nn

from mlfs.elastic.linear import ElasticLinear
from mlfs.elastic.norm import ElasticNorm
from mlfs.errors import MLFSError
from mlfs.models.families.spec import FusedBlock
from mlfs.models.follow import Forward, remade_by
from mlfs.models.fused import attention, layer, mlp  # noqa: F401  importing them registers their kinds of fused block
from mlfs.models.fused.padding import ragged_encoder
from mlfs.models.fused.registry import KINDS, KNOWN_ACTIVATIONS, Activation


def check_kind(block: FusedBlock) -> None:
    """Raises MLFSError if the kind of the fused block is not registered."""
    if type(block) not in KINDS:
        known = ", ".join(sorted(kind.__name__ for kind in KINDS))
        raise MLFSError(
            f"no forward pass is registered for fused blocks of kind {type(block).__name__}: expected one of {known}; "
            "register it in a file of mlfs/models/fused"
        )


def fused_forward(module: nn.Module, block: FusedBlock) -> Forward | None:
    """Builds the fused forward pass of `module`, a function of it and its inputs; one for all modules of a class.

    Returns None where the module has to run as it is: a part that has to be elastic is not, or its activation is one
    that the operators do not know.

    Raises:
        MLFSError: the kind of the block is not registered. AttributeError: the module lacks a part that it names.
    """
    check_kind(block)
    kind = KINDS[type(block)]
    for role in kind.others:
        _part(module, block, role)
    if not all(isinstance(_part(module, block, role), ElasticLinear) for role in kind.linears):
        return None
    if not all(isinstance(_part(module, block, role), ElasticNorm) for role in kind.norms):
        return None
    if not kind.activations:
        return _build(type(module), block)
    activation = KNOWN_ACTIVATIONS.get(type(_part(module, block, "activation")))
    if activation is None or activation.name not in kind.activations:
        return None
    return _build(type(module), block, activation)


@functools.cache
def encoder_forward(own_class: Any) -> Forward:
    """Builds the forward pass of encoders of a class whose layers take ranges in place of the attention mask."""
    return remade_by(ragged_encoder(own_class.forward), encoder_forward, own_class)


def _build(own_class: type[nn.Module], block: FusedBlock, *activation: Activation) -> Forward:
    """Builds the forward pass of modules of a class; the same one for the same arguments."""
    forward = KINDS[type(block)].build(block, own_class.forward, *activation)
    return remade_by(forward, _build, own_class, block, *activation)


def _part(module: nn.Module, block: FusedBlock, role: str) -> Any:
    """Returns the part of the module that has a role in the block; None where the entry names none."""
    name = getattr(block, role)
    return attrgetter(name)(module) if name else None
