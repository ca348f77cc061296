"""Linear layers over one x, as the operators of several take them."""

import torch
from torch import Tensor

from mlfs.ops.layer import LowRankLinear
from tests.calls import strided
from tests.devices import move


def case(
    leading: tuple[int, ...] = (2, 3), n: int = 20, rows: tuple[int, ...] = (9, 5, 7), stages: int = 1, rank: int = 4,
    bias: bool = True, layout: str = "plain", of_x: str = "plain", dtype: torch.dtype = torch.float32, seed: int = 0,
) -> tuple[Tensor, list[LowRankLinear]]:  # fmt: skip
    """x and layers of some more rows and columns than are read."""
    generator = torch.Generator().manual_seed(seed)

    def rand(*shape: int, kind: torch.dtype = dtype, layout: str = "plain") -> Tensor:
        return strided(shape, layout, generator, kind)

    layers = [
        LowRankLinear(
            rand(m + 2, n + 3, layout=layout), rand(m + 2) if bias else None,
            [rand(rank, n + 3, kind=torch.float32) / 4 for _ in range(stages)],
            [rand(m + 2, rank, kind=torch.float32) for _ in range(stages)], [2.0, 0.5, -1.0, 1.5][:stages], [0, m],
        )
        for m in rows
    ]  # fmt: skip
    return rand(*leading, n, layout=of_x), layers


def leaves(x: Tensor, layers: list[LowRankLinear], device: str, dtype: torch.dtype | None, stage: int | None):
    """The same there: x and the adapters of `stage` want gradients. (x, layers, what wants them.)"""

    def there(t: Tensor, wants: bool = False) -> Tensor:
        moved = move(t, device) if dtype is None else t.detach().to(dtype)
        return moved.requires_grad_(wants)

    x, found = there(x, True), []
    for p in layers:
        a, b = ([there(t, s == stage) for s, t in enumerate(ts)] for ts in (p.lora_a, p.lora_b))
        bias = None if p.bias is None else there(p.bias)
        found.append(LowRankLinear(there(p.weight), bias, a, b, p.scales, p.spans))
    return x, found, [x, *(ts[stage] for p in found for ts in (p.lora_a, p.lora_b) if stage is not None and ts)]
