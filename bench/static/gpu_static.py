"""What the kernels compile to, for GPUs that need not be there.

    python -m bench.static.gpu_static              every configuration of the table, to bench/results/gpu_static.json
    python -m bench.static.gpu_static --quick      of each architecture the first configuration that takes any epilogue
                                                   and the first that goes back through activations, in bfloat16
                                                   (float16: the same loops, one instruction aside in 5 of 392)
    python -m bench.static.gpu_static --arch sm90  one architecture; the results of the others are kept
    python -m bench.static.gpu_static --summary    the last results in short, measuring nothing

The file says where the results come from (`bench.environment`): of a run of some architectures, the last one.

Each kernel is compiled by Triton as it would be on the device, and its machine code read: registers, spilled bytes,
shared memory against the device's limit, matrix instructions, the length of the main loop (the mean, if there is one
for each span or layer) against that of a plain product (the same kernel without stages), and the widest load from
global memory. Exits with 1 if a kernel spills, does not fit, leaves the matrix units unused, has a main loop over 5%
longer than the plain one, or never loads 128 bits.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from itertools import product as pairs
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor

from bench.environment import environment
from bench.static.offline import TARGETS, Launch, offline
from mlfs.files import write_json
from mlfs.kernels import decode, distill, grouped, joint, norm, product, rotary
from mlfs.kernels.configs import DEVICES, PRODUCT, Config, candidates
from mlfs.ops.grouped_linear import Group
from mlfs.ops.layer import Activated, Dropout, Epilogue, LowRankLinear, Norm, Wanted
from mlfs.report.table import table

RESULTS = Path(__file__).parents[1] / "results" / "gpu_static.json"
TOKENS, ROWS, COLUMNS, RANK, VOCABULARY, PROJECTED = 4096, 3072, 768, 8, 49152, 64
PLAIN = ("no stages", "backward, no stages")  # what the others' loops are compared with
THROUGH = ("backward, GELU", "backward, tanh GELU", "backward, SiLU gate")  # backward through an activation
NEWEST = {"sm90": "HGMMA", "sm100": "UTC"}  # what a tile of 64 or more tokens must run on
# Of whole matrices: what has the loop of a plain product.
SLICED = ("product._forward", "product._backward", "product._backward_through_activation")
GROUPED, JOINT = ("grouped._forward", "grouped._backward"), ("joint._forward", "joint._backward")
LOOPS = (*SLICED, *GROUPED, *JOINT)
PRODUCTS = (*LOOPS, "_thin", "_reduce", "_parts", "_difference", "_spread")
FP32 = ("distance, backward", "learned projection")  # what multiplies fp32 numbers where the model is in fp16
Calls = dict[str, Callable[[], Any]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", action="append", choices=list(TARGETS), help="default: all")
    parser.add_argument("--kernel", action="append", choices=list(VARIANTS), help="default: all")
    parser.add_argument("--quick", action="store_true", help="one or two configurations of each architecture")
    parser.add_argument("--summary", action="store_true", help="print a Markdown table of the results in --output")
    parser.add_argument("--output", type=Path, default=RESULTS)
    given = parser.parse_args()
    if given.summary:
        print(summary(read_results(given.output)))
        return
    writes = given.output != RESULTS or not (given.quick or given.kernel)
    kept = rows_of_others(given.output, given.arch) if writes and given.arch and given.output.exists() else []
    rows: list[dict[str, Any]] = []
    for arch in given.arch or TARGETS:
        configs, types = PRODUCT[arch], [torch.bfloat16, torch.float16, torch.float32]
        if given.quick:
            configs = first_configs(arch)
            types.remove(torch.float16)
        for row in measure(arch, configs, types, given.kernel or list(VARIANTS)):
            rows.append(row)
            print(show([row]).splitlines()[-1], file=sys.stderr)
    print(show(rows))
    if writes:
        ordered = sorted(kept + rows, key=lambda row: list(TARGETS).index(row["arch"]))
        columns = list(dict.fromkeys(key for row in ordered for key in row))
        values = [[row.get(key) for key in columns] for row in ordered]
        origin = {"triton": triton.__version__, "environment": environment()}
        write_json(given.output, origin | {"columns": columns, "rows": values})
    if bad := [f"{name(row)}: {fault}" for row in rows for fault in faults(row)]:
        raise SystemExit("\n".join(bad))


def first_configs(arch: str) -> tuple[Config, ...]:
    """The first configuration that takes any epilogue, and the first that goes back through activations, in bf16."""
    found: list[Config] = []
    for gradient in (False, True):
        config = next(c for c in PRODUCT[arch] if admits(arch, c, torch.bfloat16, epilogue=True, gradient=gradient))
        if config not in found:
            found.append(config)
    return tuple(found)


def measure(
    arch: str, configs: Sequence[Config], types: Sequence[torch.dtype], kernels: Sequence[str]
) -> Iterator[dict[str, Any]]:
    """A row for each kernel that the operators' passes launch, in each variant and each configuration it may run in."""
    read_before, seen = set(), set()
    for config in configs:
        for dtype in types:
            if not admits(arch, config, dtype):
                continue
            plain: dict[bool, int] = {}
            epilogue, gradient = (admits(arch, config, dtype, *more) for more in ((True, False), (True, True)))
            for variant, call in variants(dtype, config, kernels, epilogue).items():
                if variant in THROUGH and not gradient:
                    continue
                with offline(arch) as launches:
                    call()
                for launch in launches:
                    if (code := (launch.kernel.hash, dtype)) in read_before:
                        continue
                    read_before.add(code)
                    row = read(launch, variant, dtype, config)
                    if launch.name in LOOPS:
                        row["plain loop"] = plain.setdefault(variant.startswith("backward"), row["loop"])
                    else:
                        row["config"], row["tokens"] = "", 0  # its own, whatever the product's are
                    key = tuple(str(v) for k, v in row.items() if k != "variant")
                    if key not in seen:
                        seen.add(key)
                        yield row


def admits(arch: str, config: Config, dtype: torch.dtype, epilogue: bool = False, gradient: bool = False) -> bool:
    """Whether a product of x and W of that type may run in a configuration; fp32 where it runs as tf32."""
    if dtype == torch.float32 and not arch.startswith("sm"):
        return False
    return config in candidates(arch, TOKENS, ROWS, dtype.itemsize, dtype.itemsize, epilogue, gradient)


def variants(dtype: torch.dtype, config: Config, kernels: Sequence[str], epilogue: bool) -> Calls:
    """Calls of the launchers at one large, aligned size; the plain products first. fp32: these only, as they need most
    shared memory."""
    calls = {variant: call for variant, call in of_sliced_linear(dtype, config, False).items() if variant in PLAIN}
    if dtype != torch.float32:
        for kernel in kernels:
            calls |= VARIANTS[kernel](dtype, config, epilogue)
    return calls


def of_sliced_linear(dtype: torch.dtype, config: Config, epilogue: bool) -> Calls:
    x, weight, bias, y = operands(dtype)
    fused = (0, 1024, 1024, 512, 2048, 512)
    part = torch.empty(TOKENS, 2048, dtype=dtype)

    def layer_of(count: int, spans: Sequence[int]) -> LowRankLinear:
        return LowRankLinear(weight, bias, *stages(count), spans)

    def forward(count: int, spans: Sequence[int] = (0, ROWS), keep_pre: bool = False, **more: Any) -> Callable[[], Any]:
        return lambda: product.forward(x, layer_of(count, spans), Epilogue(**more), keep_pre, config)

    def wanted_of(count: int, learns: bool = True) -> Wanted:
        return Wanted([learns and s == count - 1 for s in range(count)], True, COLUMNS)

    def backward(
        count: int, spans: Sequence[int] = (0, ROWS), learns: bool = True, residual: Tensor | None = None
    ) -> Callable[[], Any]:
        h = torch.empty(TOKENS, count * RANK, dtype=dtype)
        dz = part if spans == fused else y
        wanted = wanted_of(count, learns)
        return lambda: product.backward(dz, x, h, layer_of(count, spans), wanted, residual, config)

    def through(activation: str, operand: Tensor | None = None) -> Callable[[], Any]:
        h, activated = torch.empty(TOKENS, RANK, dtype=dtype), Activated(activation, x, operand)
        layer = layer_of(1, (0, ROWS))
        return lambda: product.backward_through_activation(y, None, h, layer, wanted_of(1), activated, config)

    calls = {
        "no stages": forward(0),
        "backward, no stages": backward(0),
        "1 stage": forward(1),
        "fused projections, 1 stage": forward(1, fused),
        "backward, 1 stage": backward(1),
        "backward, fused projections": backward(1, fused),
        "backward, frozen stage": backward(1, fused, learns=False),
    }
    if epilogue:
        calls |= {
            "3 stages": forward(3),
            "backward, 3 stages": backward(3),
            "GELU": forward(1, activation="gelu", keep_pre=True),
            "tanh GELU": forward(1, activation="gelu_tanh", keep_pre=True),
            "SiLU gate": forward(1, activation="silu_mul", operand=y, keep_pre=True),
            "residual": forward(1, residual=y),
            "backward, GELU": through("gelu"),
            "backward, tanh GELU": through("gelu_tanh"),
            "backward, SiLU gate": through("silu_mul", operand=x),
            "backward, residual": backward(1, residual=x),
        }
    return calls


def of_grouped(dtype: torch.dtype, config: Config, epilogue: bool) -> Calls:
    x, weight, bias, y = operands(dtype)
    h = torch.empty(TOKENS, RANK, dtype=dtype)
    sizes = ((COLUMNS, ROWS), (576, 2304), (384, 1536), (384, 1536))
    whole = tuple(Group(1024 * i, 1024, n, (0, m)) for i, (n, m) in enumerate(sizes))
    fused = tuple(Group(1024 * i, 1024, n, (0, n, 1024, n, 2048, n)) for i, (n, _) in enumerate(sizes))

    layer, wanted = LowRankLinear(weight, bias, *stages(1), ()), Wanted([True], True, COLUMNS)

    def forward(groups: tuple[Group, ...]) -> Callable[[], Any]:
        return lambda: grouped.forward(x, layer, groups, config)

    def backward(groups: tuple[Group, ...]) -> Callable[[], Any]:
        return lambda: grouped.backward(y, x, h, layer, groups, wanted, config)

    return {
        "4 sizes at once": forward(whole),
        "backward, 4 sizes at once": backward(whole),
        "backward, 4 sizes of fused projections": backward(fused),
    }


def of_joint(dtype: torch.dtype, config: Config, epilogue: bool) -> Calls:
    """`joint` sums gradients only in configurations that take any epilogue."""
    x, weight, bias, _ = operands(dtype)

    def layers_of(rows: list[int], count: int) -> list[LowRankLinear]:
        return [LowRankLinear(weight, bias, *stages(count), (0, m)) for m in rows]

    def forward(rows: list[int], count: int, gated: bool) -> Callable[[], Any]:
        return lambda: joint.forward(x, layers_of(rows, count), gated, True, config)

    def backward(rows: list[int], count: int, residual: Tensor | None = None) -> Callable[[], Any]:
        dys, total = [torch.empty(TOKENS, m, dtype=dtype) for m in rows], len(rows) * count
        h, trains = torch.empty(TOKENS, total * RANK, dtype=dtype), [s % count == count - 1 for s in range(total)]
        wanted = Wanted(trains, True, COLUMNS)
        return lambda: joint.backward(dys, x, h, layers_of(rows, count), wanted, residual, config)

    calls = {"3 projections": forward([2048, 512, 512], 1, False)}
    if epilogue:
        calls |= {
            "gated projections, 2 stages": forward([ROWS, ROWS], 2, True),
            "backward, 3 projections": backward([2048, 512, 512], 1),
            "backward, 3 projections, residual": backward([2048, 512, 512], 1, x),
            "backward, 2 projections, 2 stages": backward([ROWS, ROWS], 2),
        }
    return calls


def of_norm(dtype: torch.dtype, config: Config, epilogue: bool) -> Calls:
    x, line, seed = operands(dtype)[0], torch.empty(COLUMNS, dtype=dtype), torch.zeros(1, dtype=torch.int64)
    return {
        "LayerNorm, residual, dropout": lambda: norm.forward(x, x, Norm(line, line, 1e-5, False), Dropout(0.1, seed)),
        "RMSNorm": lambda: norm.forward(x, None, Norm(line, None, 1e-5, True)),
        "backward, LayerNorm": lambda: norm.backward(x, x, x, Norm(line, None, 1e-5, False), Dropout(0.1, seed), True),
    }


def of_decode(dtype: torch.dtype, config: Config, epilogue: bool) -> Calls:
    x, weight, bias, _ = operands(dtype)
    layer = LowRankLinear(weight, bias, *stages(3), (0, ROWS))
    return {"1 token": lambda: decode.forward(x[:1], layer)}


def of_rotary(dtype: torch.dtype, config: Config, epilogue: bool) -> Calls:
    q, k = (torch.empty(1, TOKENS, heads, 128, dtype=dtype) for heads in (32, 8))
    angles = torch.empty(1, TOKENS, 128, dtype=dtype)
    return {
        "queries and keys": lambda: rotary.rotary(q, k, angles, angles, dtype),
        "backward, queries and keys": lambda: rotary.rotary(q, k, angles, angles, dtype, backward=True),
    }


def of_distill(dtype: torch.dtype, config: Config, epilogue: bool) -> Calls:
    x, z = operands(dtype)[0], torch.empty(64, VOCABULARY, dtype=dtype)
    labels, sums, mask = torch.empty(64, dtype=torch.int64), torch.empty(2, 64), torch.empty(TOKENS, dtype=torch.bool)
    projection, d, scale = torch.empty(PROJECTED, COLUMNS), torch.empty(TOKENS, PROJECTED), torch.empty(())
    return {
        "task loss": lambda: distill.head_rows(z, None, labels, sums, 0.0, 1.0, 0.0, True),
        "task loss, teacher": lambda: distill.head_rows(z, z, labels, sums, 0.5, 2.0, 0.1, True),
        "distance": lambda: distill.difference(x, x, projection, mask, True),
        "distance, backward": lambda: distill.spread(d, projection, scale, COLUMNS, dtype),
        "learned projection": lambda: distill.projected_gradient(d, x),
    }


VARIANTS = {
    "sliced_linear": of_sliced_linear,
    "grouped": of_grouped,
    "joint": of_joint,
    "norm": of_norm,
    "decode": of_decode,
    "rotary": of_rotary,
    "distill": of_distill,
}


def operands(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, W, b and y."""
    x, weight = torch.empty(TOKENS, COLUMNS, dtype=dtype), torch.empty(ROWS, COLUMNS, dtype=dtype)
    return x, weight, torch.empty(ROWS, dtype=dtype), torch.empty(TOKENS, ROWS, dtype=dtype)


def stages(count: int) -> tuple[list[Tensor], list[Tensor], list[float]]:
    return [torch.empty(RANK, COLUMNS)] * count, [torch.empty(ROWS, RANK)] * count, [2.0] * count


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
        "loop": launch.loop_length,
        "load bits": launch.global_load_bits,
    }


def faults(row: dict[str, Any]) -> Iterator[str]:
    """What is wrong with a row; `_finish`, rotary and element-wise kernels multiply no matrices."""
    if row["spills"]:
        yield f"spills {row['spills']} bytes"
    if row["shared"] > row["shared limit"]:
        yield f"takes {row['shared']} bytes of shared memory, the device has {row['shared limit']}"
    no_units = row["arch"] == "gfx1100" and row["type"] == "float16" and row["variant"] in FP32  # for fp32
    if row["kernel"].endswith(PRODUCTS) and not row["matrix"] and not no_units:
        yield "leaves the matrix units unused"
    if row["kernel"] in LOOPS:
        if (kind := NEWEST.get(row["arch"])) and row["tokens"] >= 64 and kind not in row["matrix kind"]:
            yield f"uses {row['matrix kind']}, not {kind}"
        if row["loop"] > 1.05 * row["plain loop"]:
            yield f"has a main loop of {row['loop']} instructions, a plain product has {row['plain loop']}"
        if row["load bits"] < 128:
            yield f"loads at most {row['load bits']} bits at once"


def name(row: dict[str, Any]) -> str:
    return " ".join(row[key] for key in ("arch", "kernel", "variant", "type", "config")).rstrip()


def show(rows: list[dict[str, Any]]) -> str:
    return table([{k: v for k, v in row.items() if k not in ("shared limit", "tokens")} for row in rows])


def rows_of_others(path: Path, measured: Sequence[str]) -> list[dict[str, Any]]:
    """What a file holds of other architectures, if the same Triton compiled it."""
    if (version := json.loads(path.read_text(encoding="utf-8"))["triton"]) != triton.__version__:
        raise SystemExit(
            f"{path} was compiled by Triton {version}, not {triton.__version__}: measure all architectures"
        )
    return [row for row in read_results(path) if row["arch"] not in measured]


def read_results(path: Path) -> list[dict[str, Any]]:
    result = json.loads(path.read_text(encoding="utf-8"))
    return [dict(zip(result["columns"], values, strict=True)) for values in result["rows"]]


def summary(rows: list[dict[str, Any]]) -> str:
    """A Markdown table, as in the README: of each architecture the products, and all other kernels together."""
    lines = [
        "| GPU | kernel | registers | spilled | shared memory | runs on | longest main loop | load |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    names = (
        dict.fromkeys(SLICED, "sliced product")
        | dict.fromkeys(GROUPED, "several sizes")
        | dict.fromkeys(JOINT, "several projections")
    )
    kinds = dict.fromkeys((*names.values(), "the others"))
    for arch, kernel in pairs(dict.fromkeys(row["arch"] for row in rows), kinds):
        some = [row for row in rows if row["arch"] == arch and names.get(row["kernel"], "the others") == kernel]
        if not some:
            continue
        registers = [row["registers"] for row in some]
        ratios = [row["loop"] / row["plain loop"] for row in some if row["plain loop"]]
        cells = [
            arch,
            kernel,
            f"{min(registers)} to {max(registers)}",
            f"{max(row['spills'] for row in some)} B",
            f"{max(row['shared'] for row in some) / 1024:.0f} of {some[0]['shared limit'] // 1024} KiB",
            ", ".join(sorted({kind for row in some for kind in row["matrix kind"].split("+") if kind})) or "-",
            f"{max(ratios):.2f} × plain" if ratios else "-",
            f"{min(row['load bits'] for row in some)} bits",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    torch.set_float32_matmul_precision("high")  # tf32
    main()
