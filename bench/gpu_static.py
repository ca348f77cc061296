"""What the kernels compile to, for GPUs that need not be there.

    python -m bench.gpu_static                  every configuration of the table, to bench/results/gpu_static.json
    python -m bench.gpu_static --quick          the first configuration of each architecture
    python -m bench.gpu_static --arch sm90      one architecture

Each kernel is compiled by Triton as it would be on the device, and its machine code read: registers, spilled bytes,
shared memory against the device's limit, matrix instructions, the length of the main loop against that of a plain
product (the same kernel without stages), and the widest load from global memory. Exits with 1 if a kernel spills, does
not fit, leaves the matrix units unused, has a main loop over 5% longer than the plain one, or never loads 128 bits.
"""

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor

from bench.offline import TARGETS, Launch, offline
from mlfs.checkpoint import write_json
from mlfs.kernels import decode, grouped, norm, sliced_linear
from mlfs.kernels.configs import DEVICES, PRODUCT, Config
from mlfs.ops.grouped_linear import Group
from mlfs.palette import table

RESULTS = Path(__file__).parent / "results" / "gpu_static.json"
TOKENS, ROWS, COLUMNS, RANK = 4096, 3072, 768, 8
KERNELS = ("sliced_linear", "grouped", "norm", "decode")
SLACK = 1.05
NEWEST = {"sm90": "HGMMA", "sm100": "UTC"}  # what a tile of 64 or more tokens must run on


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", action="append", choices=list(TARGETS), help="default: all")
    parser.add_argument("--kernel", action="append", choices=KERNELS, help="default: all")
    parser.add_argument("--quick", action="store_true", help="the first configuration of each architecture")
    parser.add_argument("--output", type=Path, default=RESULTS)
    given = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for arch in given.arch or TARGETS:
        for row in measure(arch, PRODUCT[arch][:1] if given.quick else PRODUCT[arch], given.kernel or KERNELS):
            rows.append(row)
            print(show([row]).splitlines()[-1], file=sys.stderr)
    print(show(rows))
    if given.output != RESULTS or not (given.quick or given.arch or given.kernel):
        columns = list(dict.fromkeys(key for row in rows for key in row))
        values = [[row.get(key) for key in columns] for row in rows]
        write_json(given.output, {"triton": triton.__version__, "columns": columns, "rows": values})
    if bad := [f"{row['arch']} {row['kernel']} {row['variant']}: {fault}" for row in rows for fault in faults(row)]:
        raise SystemExit("\n".join(bad))


def measure(arch: str, configs: tuple[Config, ...], kernels: Sequence[str]) -> Iterator[dict[str, Any]]:
    """A row for each kernel that the operator's passes launch, in each configuration and variant."""
    seen = set()
    for config in configs:
        plain: dict[Any, int] = {}
        for dtype in (torch.bfloat16, torch.float16):
            for variant, call in variants(dtype, config, kernels).items():
                with offline(arch) as launches:
                    call()
                for launch in launches:
                    row = read(launch, variant, dtype, config)
                    backward = variant.startswith("backward")
                    if launch.name == "sliced_linear._product":
                        if variant in ("no stages", "backward, no stages"):
                            plain[dtype, backward] = row["loop"]
                        row["plain loop"] = plain[dtype, backward]
                    elif launch.name == "grouped._product":
                        row["plain loop"] = plain[dtype, backward]
                    else:
                        row["config"] = ""  # its own, whatever the product's is
                    key = tuple(str(v) for k, v in row.items() if k != "variant")
                    if key not in seen:
                        seen.add(key)
                        yield row


def variants(dtype: torch.dtype, config: Config, kernels: Sequence[str]) -> dict[str, Callable[[], Any]]:
    """Calls of the launchers at one large, aligned size; the plain products first."""
    x, weight = torch.empty(TOKENS, COLUMNS, dtype=dtype), torch.empty(ROWS, COLUMNS, dtype=dtype)
    bias, y = torch.empty(ROWS, dtype=dtype), torch.empty(TOKENS, ROWS, dtype=dtype)
    fused = [0, 1024, 1024, 512, 2048, 512]
    part = torch.empty(TOKENS, 2048, dtype=dtype)

    def stages(count: int) -> tuple[list[Tensor], list[Tensor], list[float]]:
        return [torch.empty(RANK, COLUMNS)] * count, [torch.empty(ROWS, RANK)] * count, [2.0] * count

    def forward(count: int, spans: list[int] = [0, ROWS], **options: Any) -> Callable[[], Any]:  # noqa: B006
        return lambda: sliced_linear.forward(x, weight, bias, *stages(count), spans, config=config, **options)

    def backward(count: int, spans: list[int] = [0, ROWS]) -> Callable[[], Any]:  # noqa: B006
        h = torch.empty(TOKENS, count * RANK, dtype=dtype)
        dz = y if spans == [0, ROWS] else part
        trains = [s == count - 1 for s in range(count)]
        return lambda: sliced_linear.backward(
            dz, x, h, weight, *stages(count), spans, trains, True, COLUMNS, config=config
        )

    line, seed = torch.empty(COLUMNS, dtype=dtype), torch.zeros(1, dtype=torch.int64)
    sizes = ((COLUMNS, ROWS), (576, 2304), (384, 1536), (384, 1536))
    groups = tuple(Group(1024 * i, 1024, n, (0, m)) for i, (n, m) in enumerate(sizes))

    def several(back: bool = False) -> Callable[[], Any]:
        h = torch.empty(TOKENS, RANK, dtype=dtype)
        if back:
            return lambda: grouped.backward(y, x, h, weight, *stages(1), groups, [True], True, config=config)
        return lambda: grouped.forward(x, weight, bias, *stages(1), groups, config=config)

    small = config.block_t * config.block_c <= 128 * 128  # what `configs.candidates` admits with an epilogue
    epilogues = {
        "4 sizes at once": several(),
        "backward, 4 sizes at once": several(True),
        "GELU": forward(1, activation="gelu", keep_pre=True),
        "tanh GELU": forward(1, activation="gelu_tanh", keep_pre=True),
        "SiLU gate": forward(1, activation="silu_mul", operand=y, keep_pre=True),
        "residual": forward(1, residual=y),
    }
    calls = {
        "no stages": forward(0),
        "backward, no stages": backward(0),
        "1 stage": forward(1),
        "3 stages": forward(3),
        "fused projections, 1 stage": forward(1, fused),
        "backward, 1 stage": backward(1),
        "backward, 3 stages": backward(3),
        "backward, fused projections": backward(1, fused),
        "1 token": lambda: decode.forward(x[:1], weight, bias, *stages(3), [0, ROWS]),
        "LayerNorm, residual, dropout": lambda: norm.forward(x, x, line, line, 1e-5, False, 0.1, seed),
        "RMSNorm": lambda: norm.forward(x, None, line, None, 1e-5, True),
        "backward, LayerNorm": lambda: norm.backward(x, x, x, line, 1e-5, False, 0.1, seed, True),
    }
    if small:
        calls |= epilogues
    module = {**dict.fromkeys(("4 sizes at once", "backward, 4 sizes at once"), "grouped"), "1 token": "decode"}
    norms = [name for name in calls if "Norm" in name]
    module |= dict.fromkeys(norms, "norm")
    plain = ("no stages", "backward, no stages")  # what the others' loops are compared with
    return {name: call for name, call in calls.items() if name in plain or module.get(name, KERNELS[0]) in kernels}


def read(launch: Launch, variant: str, dtype: torch.dtype, config: Config) -> dict[str, Any]:
    """The row of one launch."""
    return {
        "arch": launch.arch,
        "kernel": launch.name,
        "variant": variant,
        "type": str(dtype)[6:],
        "config": f"{config.block_t}x{config.block_c}x{config.block_k}, {config.warps} warps, {config.stages} stages",
        **launch.resources,
        "tokens": config.block_t,
        "shared limit": DEVICES[launch.arch].shared,
        "matrix": launch.matrix_instructions,
        "matrix kind": "+".join(launch.matrix_kinds),
        "loop": len(launch.main_loop),
        "load bits": launch.global_load_bits,
    }


def faults(row: dict[str, Any]) -> Iterator[str]:
    """What is wrong with a row; `_finish` and element-wise kernels multiply no matrices."""
    if row["spills"]:
        yield f"spills {row['spills']} bytes"
    if row["shared"] > row["shared limit"]:
        yield f"takes {row['shared']} bytes of shared memory, the device has {row['shared limit']}"
    if row["kernel"].endswith(("_product", "_thin", "_reduce", "_parts")) and not row["matrix"]:
        yield "leaves the matrix units unused"
    if row["kernel"].endswith("_product"):
        if (kind := NEWEST.get(row["arch"])) and row["tokens"] >= 64 and kind not in row["matrix kind"]:
            yield f"uses {row['matrix kind']}, not {kind}"
        if row["loop"] > SLACK * row["plain loop"]:
            yield f"has a main loop of {row['loop']} instructions, a plain product has {row['plain loop']}"
        if row["load bits"] < 128:
            yield f"loads at most {row['load bits']} bits at once"


def show(rows: list[dict[str, Any]]) -> str:
    return table([{k: v for k, v in row.items() if k not in ("shared limit", "tokens")} for row in rows])


if __name__ == "__main__":
    main()
