"""What launchers make of an operator's values: the arguments of kernels, by name.

Nothing here, nor in any other file of this folder, imports `mlfs.ops` when it runs: a layer and what goes with it are
read by their attributes, which `mlfs.ops.layer` states.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
import triton
from torch import Tensor

from mlfs.kernels.configs import Config, architecture, choose

if TYPE_CHECKING:
    from mlfs.ops.layer import Epilogue, LowRankLinear

MAX_SPANS = MAX_STAGES = 3  # in one launch; more spans take more launches, more stages are packed into one
Arguments = dict[str, Any]


class Stages:
    """The low-rank stages as the kernels read them: at most three, of one rank, rows contiguous.

    Attributes:
        a, b: of each stage A (r, N) and B (M, r); b may be empty where only the a are read.
        scales: c of each stage.
        rank_scales: c of each rank, if more stages, or stages of several ranks, were packed into one of scale 1; then
            h and g are multiplied by it after their kernels.
        a_q, b_c: how far rows of A and of B lie apart; 0 without stages.
        count: how many there are. rank: of each. width: the ranks of all, side by side.
        block_r: ranks that a kernel takes at once.
    """

    def __init__(
        self, a: list[Tensor], b: list[Tensor], scales: list[float], rank_scales: Tensor | None = None
    ) -> None:
        self.a, self.b, self.scales, self.rank_scales = a, b, scales, rank_scales
        self.count, self.rank, self.a_q = len(a), 0, 0
        if a:
            self.rank, self.a_q = a[0].shape[0], a[0].stride(0)
        self.b_c = b[0].stride(0) if b else 0
        self.width = self.count * self.rank
        self.block_r = block_of_ranks(self.width)

    @classmethod
    def pack(cls, a: Sequence[Tensor], b: Sequence[Tensor], scales: Sequence[float]) -> "Stages":
        """Returns these stages; as one, if there are more than three or their ranks differ."""
        if len(a) <= MAX_STAGES and len({t.shape[0] for t in a}) <= 1:
            return cls([t.contiguous() for t in a], [t.contiguous() for t in b], list(scales))
        packed_b = [torch.cat(list(b), dim=1)] if b else []
        of_ranks = [t.new_full((t.shape[0],), scale) for t, scale in zip(a, scales, strict=True)]
        return cls([torch.cat(list(a))], packed_b, [1.0], torch.cat(of_ranks))

    @classmethod
    def of(cls, layer: "LowRankLinear") -> "Stages":
        """Returns those of a layer."""
        return cls.pack(layer.lora_a, layer.lora_b, layer.scales)

    def with_rows(self, rows: Tensor) -> "Stages":
        """Returns the stages with these rows of B only."""
        return Stages(self.a, [t.index_select(0, rows) for t in self.b], self.scales, self.rank_scales)

    def rescale_(self, h: Tensor) -> None:
        """Multiplies h, or g, by the scales of its ranks where no kernel did."""
        if self.rank_scales is not None:
            h.mul_(self.rank_scales)

    def pointers(self, matrices: list[Tensor], otherwise: Tensor, name: str = "stage") -> Arguments:
        """Returns stage0 to stage2 of the stages' A or B; `otherwise`, if there are none."""
        return numbered(name, matrices or [otherwise])

    def scale_arguments(self) -> Arguments:
        """Returns scale0 to scale2."""
        scale0, scale1, scale2 = [*self.scales, 0.0, 0.0, 0.0][:3]
        return {"scale0": scale0, "scale1": scale1, "scale2": scale2}

    def sizes(self) -> Arguments:
        """Returns STAGES, RANK and BLOCK_R."""
        return {"STAGES": self.count, "RANK": max(self.rank, 1), "BLOCK_R": self.block_r}


@dataclass(frozen=True)
class Product:
    """A product that is ready to be launched, in tiles that are still to be chosen.

    Attributes:
        kernel: takes x and w first, then `arguments` by name.
        columns: lengths of the spans of columns; tiles do not cross from one into another.
        depths: lengths of the parts that it sums over, one after the other.
    """

    kernel: Any
    x: Tensor
    w: Tensor
    arguments: Arguments
    columns: Sequence[int]
    depths: Sequence[int]

    def launch(self, config: Config, **more: Any) -> None:
        """Launches the kernel in these tiles; `more` arguments may depend on them."""
        tiles_c = sum(triton.cdiv(length, config.block_c) for length in self.columns)
        tiles_t = triton.cdiv(self.x.shape[0], config.block_t)
        self.kernel[(tiles_t * tiles_c,)](
            self.x, self.w, **self.arguments, **more, EVEN_K=divides(config.block_k, self.depths),
            PRECISION=precision_of(self.x), GROUP=config.group, **tile_arguments(config),
        )  # fmt: skip

    def choose(
        self,
        name: str,
        run: Callable[[Config], None] | None = None,
        epilogue: bool = False,
        gradient: bool = False,
    ) -> Config:
        """Returns the tiles for the product `name`: see `configs.choose`. `run` launches it, by default `launch`."""
        shape = self.x.shape[0], sum(self.columns), sum(self.depths)
        dtypes = self.x.dtype, self.w.dtype
        return choose(name, architecture(self.x.device), shape, dtypes, run or self.launch, epilogue, gradient)


def numbered(name: str, values: Sequence[Any]) -> Arguments:
    """Returns three arguments for one to three values; the first stands for those that are missing.

    Args:
        name: "w" for w0, w1 and w2; "w{}_k" for w0_k, ...
    """
    three = values if len(values) == 3 else [*values, values[0], values[0]][:3]
    return dict(zip(_names(name), three, strict=True))


@cache  # formatting takes as long as the rest
def _names(name: str) -> list[str]:
    pattern = name if "{}" in name else name + "{}"
    return [pattern.format(i) for i in range(3)]


def span_arguments(spans: Sequence[int]) -> Arguments:
    """Returns start0, length0 to start2, length2 and SPANS of one to three spans, given as flat (start, length)."""
    start0, length0, start1, length1, start2, length2 = [*spans, 0, 0, 0, 0, 0, 0][:6]
    places = {"start0": start0, "length0": length0, "start1": start1, "length1": length1}
    return places | {"start2": start2, "length2": length2, "SPANS": len(spans) // 2}


def tile_arguments(config: Config) -> Arguments:
    """Returns the tile sizes of a product, and how many warps and pipeline stages run it."""
    return {
        "BLOCK_T": config.block_t,
        "BLOCK_C": config.block_c,
        "BLOCK_K": config.block_k,
        "num_warps": config.warps,
        "num_stages": config.stages,
    }


def epilogue_parts(epilogue: "Epilogue | None") -> tuple[str, Tensor | None, Tensor | None]:
    """Returns activation, operand and residual, with contiguous rows; None is no epilogue."""
    if epilogue is None:
        return "none", None, None
    return epilogue.activation, rows_or_none(epilogue.operand), rows_or_none(epilogue.residual)


def divides(block: int, sizes: Iterable[int]) -> bool:
    """Returns whether tiles of that size end where each of `sizes` does."""
    return not any(size % block for size in sizes)


@cache
def block_of_ranks(ranks: int) -> int:
    """Returns how many ranks a kernel takes at once: matrix units want 16 at least."""
    return min(64, max(16, triton.next_power_of_2(max(ranks, 1))))


def pairs_of(spans: Sequence[int]) -> list[tuple[int, int]]:
    """Returns flat spans as pairs (start, length)."""
    return list(zip(spans[::2], spans[1::2], strict=True))


def in_launches(spans: Sequence[int]) -> list[tuple[list[int], slice]]:
    """Returns the spans that have rows, at most three at a time, and which columns of the result each lot makes."""
    if len(spans) == 2 and spans[1]:
        return [(list(spans), slice(0, spans[1]))]
    pairs = [pair for pair in pairs_of(spans) if pair[1]]
    launches, column = [], 0
    for first in range(0, len(pairs), MAX_SPANS):
        lot = [number for pair in pairs[first : first + MAX_SPANS] for number in pair]
        end = column + sum(lot[1::2])
        launches.append((lot, slice(column, end)))
        column = end
    return launches


def with_rows(x: Tensor) -> Tensor:
    """Returns x with contiguous rows, as it is if they are."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def rows_or_none(x: Tensor | None) -> Tensor | None:
    """Returns `with_rows(x)`; None of None."""
    return None if x is None else with_rows(x)


def columns_or_none(x: Tensor | None, columns: slice) -> Tensor | None:
    """Returns columns of x; None of None."""
    return None if x is None else x[:, columns]


def optional(tensor: Tensor | None, otherwise: Tensor) -> Tensor:
    """Returns the pointer of an argument that a kernel may not look at: any will do."""
    return otherwise if tensor is None else tensor


def stride_or_zero(tensor: Tensor | None) -> int:
    """Returns how far rows lie apart; 0 for a tensor that no kernel looks at."""
    return 0 if tensor is None else tensor.stride(0)


def precision_of(x: Tensor) -> str:
    """Returns how matrices of x's type are multiplied: as tf32 where PyTorch's own products take it."""
    arch = architecture(x.device)
    if arch == "interpreter":
        return "interpreted"
    allowed = x.dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest"
    return "tf32" if allowed and arch.startswith("sm") else "ieee"
