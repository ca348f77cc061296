"""Which tile sizes a kernel runs with: a fixed table per architecture, pruned by a cost model, tuned once on a GPU.

The tuned choice of each shape class is kept in `~/.cache/mlfs/tuned-*.json`. Nothing is tuned where MLFS_TUNE=0 or CI
is set, while a CUDA graph is recorded, or in Triton's interpreter: the cost model's first choice runs there.
"""

import json
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
import triton


@dataclass(frozen=True)
class Config:
    """Tile of tokens × columns × depth, and how many warps and pipeline stages run it."""

    block_t: int
    block_c: int
    block_k: int
    warps: int
    stages: int
    group: int = 8

    def shared_bytes(self, itemsize: int, weight_itemsize: int, reads_shared: bool = False) -> int:
        """Returns the shared memory that a product's operand tiles take, all pipeline stages together."""
        tiles = self.stages if reads_shared else max(self.stages - 1, 1)
        return tiles * self.block_k * (self.block_t * itemsize + self.block_c * weight_itemsize)


@dataclass(frozen=True)
class Device:
    """What the cost model knows of an architecture: shared memory a block may take, multiprocessors, and whether
    matrix units read shared memory while the next tiles come in, which takes room for one more."""

    shared: int
    processors: int
    reads_shared: bool = False


DEVICES = {
    "sm80": Device(163 << 10, 108),
    "sm86": Device(99 << 10, 84),
    "sm89": Device(99 << 10, 128),
    "sm90": Device(227 << 10, 132, True),
    "sm100": Device(227 << 10, 148, True),
    "gfx942": Device(64 << 10, 304),
    "gfx1100": Device(64 << 10, 96),
    "interpreter": Device(1 << 30, 8),  # enough to split what GPUs split
}
_AMPERE = (
    Config(128, 128, 32, 8, 4),
    Config(128, 64, 64, 8, 3),
    Config(64, 128, 64, 8, 3),
    Config(64, 64, 64, 4, 4),
    Config(32, 64, 64, 4, 4),
    Config(16, 64, 32, 4, 8),
)
_HOPPER = (
    Config(128, 256, 64, 8, 3),
    Config(128, 128, 64, 8, 4),
    Config(128, 64, 64, 4, 4),
    Config(64, 128, 64, 4, 4),
    Config(64, 64, 64, 4, 4),
    Config(16, 64, 64, 4, 4),
)
_CDNA = (
    Config(128, 128, 32, 8, 2),
    Config(128, 64, 64, 4, 2),
    Config(64, 64, 64, 4, 2),
    Config(32, 128, 64, 4, 2),
    Config(16, 64, 64, 4, 2),
)
_RDNA = (Config(64, 64, 32, 4, 2), Config(32, 64, 32, 4, 2), Config(16, 64, 32, 2, 2))
PRODUCT: dict[str, tuple[Config, ...]] = {
    "sm80": _AMPERE,
    "sm86": _AMPERE,
    "sm89": _AMPERE,
    "sm90": _HOPPER,
    "sm100": _HOPPER,
    "gfx942": _CDNA,
    "gfx1100": _RDNA,
    "interpreter": (Config(64, 64, 64, 4, 1),),
}


# Tiles in which a product that goes back through an activation would run out of registers.
TOO_LARGE_FOR_GRADIENTS = {"sm90": (128, 64), "sm100": (128, 64), "gfx942": (128, 128), "gfx1100": (64, 64)}

# Depth of a tile and pipeline stages where tiles are thin and loads are all there is: the thin product, and decoding.
THIN = {"gfx942": (64, 2), "gfx1100": (32, 2), "sm86": (64, 3), "sm89": (64, 3)}
_assumed: str | None = None


@contextmanager
def assume(arch: str) -> Iterator[None]:
    """Inside the block kernels are launched as for `arch`, whatever their tensors are on: to compile without a GPU."""
    global _assumed
    previous, _assumed = _assumed, arch
    try:
        yield
    finally:
        _assumed = previous


def architecture(device: torch.device) -> str:
    """Returns the key of the tables for `device`: the nearest older one where its own is not in them."""
    if _assumed is not None:
        return _assumed
    return _architecture(device) if device.type == "cuda" else "interpreter"


@cache  # every launch asks, some of them five times
def _architecture(device: torch.device) -> str:
    """Returns the key of the tables for a GPU."""
    if torch.version.hip:
        name = torch.cuda.get_device_properties(device).gcnArchName.partition(":")[0]
        return name if name in DEVICES else "gfx1100" if name.startswith(("gfx10", "gfx11", "gfx12")) else "gfx942"
    major, minor = torch.cuda.get_device_capability(device)
    known = sorted(int(key[2:]) for key in DEVICES if key.startswith("sm"))
    fitting = [value for value in known if value <= major * 10 + minor]
    return f"sm{fitting[-1] if fitting else known[0]}"


def gradient_part(device: torch.device) -> int:
    """Returns in how many columns at once a tile goes back through an activation: more run out of registers."""
    return 16 if architecture(device) == "gfx1100" else 32


def thin(device: torch.device, itemsize: int) -> tuple[int, int]:
    """Returns block_k and stages of the thin kernels for operands of that size."""
    block_k, stages = THIN.get(architecture(device), (128, 3))
    return max(block_k * 2 // itemsize, 16) if itemsize > 2 else block_k, stages


def unroll(device: torch.device, count: int) -> int:
    """Returns how often to unroll a loop over `count` products, each a loop over its depth, into one accumulator.

    Where matrix units take operands from registers, as on sm80, loops in a row differ in how these are kept there: 121
    instructions a step instead of a plain product's 115 (joint, 128 × 128 × 32). One loop, whose operands are chosen
    before it, has 115. Elsewhere that makes loops longer (gfx1100, joint, 64 × 64 × 32: 97 instead of 80).
    """
    return 1 if PRODUCT[architecture(device)] is _AMPERE else count


@cache  # sorting takes longer than the rest of a launch's preparation
def candidates(
    arch: str,
    tokens: int,
    columns: int,
    itemsize: int,
    weight_itemsize: int,
    epilogue: bool = False,
    gradient: bool = False,
) -> tuple[Config, ...]:
    """Returns the configurations that fit the device, best first by the cost model.

    With an epilogue beyond the bias, or several stages, a tile has at most 128 × 128 numbers: bigger ones run out of
    registers (see bench/static/gpu_static.py).

    The model: waves of blocks over the multiprocessors, times the work of one tile, padding included; tiles that reuse
    little of what they load (low block_t · block_c / (block_t + block_c)) are charged for the loads.
    """
    device = DEVICES[arch]

    def cost(config: Config) -> float:
        blocks = triton.cdiv(tokens, config.block_t) * triton.cdiv(columns, config.block_c)
        work = config.block_t * config.block_c
        reuse = work / (config.block_t + config.block_c)
        return triton.cdiv(blocks, device.processors) * work * (1 + 32 / reuse)

    fits = [c for c in PRODUCT[arch] if c.shared_bytes(itemsize, weight_itemsize, device.reads_shared) <= device.shared]
    if epilogue or gradient:
        fits = [c for c in fits if c.block_t * c.block_c <= 128 * 128]
    if gradient:
        fits = [c for c in fits if (c.block_t, c.block_c) != TOO_LARGE_FOR_GRADIENTS.get(arch)]
    return tuple(sorted(fits or PRODUCT[arch][-1:], key=cost))


def choose(
    kernel: str,
    arch: str,
    shape: tuple[int, int, int],
    dtypes: tuple[torch.dtype, torch.dtype],
    run: Callable[[Config], Any] | None = None,
    epilogue: bool = False,
    gradient: bool = False,
    keep: int = 3,
) -> Config:
    """Returns the configuration of `kernel` for a shape (tokens, columns, depth) and the types of x and W.

    Args:
        run: launches the kernel with a configuration; the best `keep` candidates are timed with it, once per shape
            class (sizes rounded up to powers of two) and GPU.
        epilogue: whether the kernel does more with its tile than add a bias and one stage.
        gradient: whether it takes its tile back through an activation.
    """
    fitting = candidates(arch, shape[0], shape[1], dtypes[0].itemsize, dtypes[1].itemsize, epilogue, gradient)
    if run is None or len(fitting) == 1 or not may_tune():
        return fitting[0]
    sizes = "x".join(str(triton.next_power_of_2(max(size, 1))) for size in shape)
    more = "+gradient" if gradient else "+epilogue" if epilogue else ""
    key = f"{kernel}{more}/{sizes}/{str(dtypes[0])[6:]}/{str(dtypes[1])[6:]}"
    tuned = _tuned(_cache_file())
    if key not in tuned:
        times = {config: _time(run, config) for config in fitting[:keep]}
        tuned[key] = asdict(min(times, key=times.__getitem__))
        _write(_cache_file(), tuned)
    return Config(**tuned[key])


def may_tune() -> bool:
    """Returns whether kernels may be timed now."""
    return (
        torch.cuda.is_available()
        and os.environ.get("MLFS_TUNE", "1") != "0"
        and not os.environ.get("CI")
        and not torch.cuda.is_current_stream_capturing()
    )


def _time(run: Callable[[Config], Any], config: Config) -> float:
    try:
        return triton.testing.do_bench(lambda: run(config), warmup=10, rep=30, return_mode="median")
    except triton.runtime.errors.OutOfResources:
        return float("inf")


@cache
def _cache_file() -> Path:
    name = "-".join(torch.cuda.get_device_name().split())
    return Path.home() / ".cache" / "mlfs" / f"tuned-{name}-triton-{triton.__version__}.json"


@cache
def _tuned(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return {}


def _write(path: Path, tuned: dict[str, Any]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False, encoding="utf-8") as file:
            json.dump(tuned, file, indent=1, sort_keys=True)
        os.replace(file.name, path)
    except OSError:
        pass  # a read-only home: tuned again next time
