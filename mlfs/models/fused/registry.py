"""The kinds of fused block: which parts each needs, and what builds its forward pass.

A kind is a dataclass in `mlfs.models.families.spec`, whose fields (roles) name parts of a module. The file that has its
forward pass registers it, with `registers`.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from transformers.activations import ACT2FN

from mlfs.models.families.spec import FusedBlock
from mlfs.models.follow import Forward

Builder = TypeVar("Builder", bound=Callable[..., Forward])


@dataclass(frozen=True)
class Activation:
    """An activation of transformers that the operators know.

    Attributes:
        name: in `mlfs.ops`.
        written_out: whether transformers computes it by several of PyTorch's operators, which round otherwise than one.
    """

    name: str
    written_out: bool = False


KNOWN_ACTIVATIONS = {
    type(ACT2FN["gelu"]): Activation("gelu"),
    type(ACT2FN["gelu_new"]): Activation("gelu_tanh", written_out=True),
    type(ACT2FN["gelu_pytorch_tanh"]): Activation("gelu_tanh"),
    type(ACT2FN["silu"]): Activation("silu_mul"),  # with the product of a gated block
}
GELUS = ("gelu", "gelu_tanh")
GATED = ("silu_mul",)


@dataclass(frozen=True)
class Kind:
    """A registered kind of fused block; see `registers`."""

    build: Callable[..., Forward]
    linears: tuple[str, ...]
    norms: tuple[str, ...]
    others: tuple[str, ...]
    activations: tuple[str, ...]


KINDS: dict[type, Kind] = {}


def registers(
    kind: type[FusedBlock],
    linears: tuple[str, ...] = (),
    norms: tuple[str, ...] = (),
    others: tuple[str, ...] = (),
    activations: tuple[str, ...] = (),
) -> Callable[[Builder], Builder]:
    """Registers the decorated function as what builds the forward pass of fused blocks of a kind.

    The function takes the block, the module's own forward pass and, where there are `activations`, the `Activation` in
    the role `activation`. It returns a function of the module and its inputs, and is called once for the same values.

    Args:
        linears: roles that have to be elastic linear layers. norms: roles that have to be elastic norms.
        others: roles that only have to be there, where the block names them.
        activations: those that the forward pass computes, by their names in `mlfs.ops`; empty: it has none.
    """

    def register(build: Builder) -> Builder:
        KINDS[kind] = Kind(functools.cache(build), linears, norms, others, activations)
        return build

    return register
