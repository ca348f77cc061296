"""The kernels compile for GPUs that are not there, and what they compile to is what it should be."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
ROOT = Path(__file__).resolve().parents[2]
ARCHITECTURES = ("sm80", "sm90", "sm100", "gfx942", "gfx1100")
# Each takes some 50 s: one in `make test`, all in `make soak`.
QUICK = ("sm90",)


@pytest.mark.parametrize("arch", [pytest.param(a, marks=() if a in QUICK else pytest.mark.soak) for a in ARCHITECTURES])
def test_kernels_fit_spill_nothing_and_have_the_main_loop_of_a_plain_product(arch, tmp_path):
    """In a process of its own: here the kernels were imported for Triton's interpreter."""
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    output = tmp_path / "static.json"
    command = [sys.executable, "-m", "bench.static.gpu_static", "--quick", "--arch", arch, "--output", str(output)]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(output.read_text())
    names = {row[result["columns"].index("kernel")] for row in result["rows"]}
    assert {"product._forward", "product._backward", "product._backward_through_activation"} <= names
    assert {"reductions._thin", "reductions._reduce", "reductions._finish"} <= names
    assert {f"grouped.{kernel}" for kernel in ("_forward", "_backward", "_thin", "_reduce")} <= names
    assert {"joint._forward", "joint._backward"} <= names
    assert {"norm._forward", "norm._backward", "decode._parts", "decode._sum", "rotary._rotary"} <= names
    assert {"distill._head_rows", "distill._difference", "distill._spread"} <= names
    assert ("reductions._thin_reduce" in names) == (arch != "gfx1100")  # there it takes two passes


def test_published_results_are_of_the_table_and_have_no_faults():
    from bench.static.gpu_static import LOOPS, RESULTS, admits, faults, name, read_results, summary
    from mlfs.kernels.configs import PRODUCT

    rows = read_results(RESULTS)
    assert not [f"{name(row)}: {fault}" for row in rows for fault in faults(row)]
    for arch in ARCHITECTURES:
        for kernel in LOOPS:
            gradient = kernel == "product._backward_through_activation"
            epilogue = gradient or kernel == "joint._backward"
            configs = [c for c in PRODUCT[arch] if admits(arch, c, torch.bfloat16, epilogue, gradient)]
            tiles = {f"{c.block_t}x{c.block_c}x{c.block_k}, {c.warps} warps, {c.stages} stages" for c in configs}
            assert {row["config"] for row in rows if (row["arch"], row["kernel"]) == (arch, kernel)} == tiles
        kernels = {row["kernel"] for row in rows if row["arch"] == arch}
        assert {f"distill.{kernel}" for kernel in ("_head_rows", "_difference", "_spread")} <= kernels
        assert "rotary._rotary" in kernels
        assert ("reductions._thin_reduce" in kernels) == (arch != "gfx1100")
    assert summary(rows) in (ROOT / "docs" / "kernels.md").read_text(encoding="utf-8")


def test_one_architecture_is_measured_into_the_results_of_the_others(tmp_path):
    import triton

    from bench.static.gpu_static import rows_of_others

    path, rows = tmp_path / "static.json", [["sm80", 1], ["sm90", 2]]
    path.write_text(json.dumps({"triton": triton.__version__, "columns": ["arch", "spills"], "rows": rows}))
    assert rows_of_others(path, ["sm90"]) == [{"arch": "sm80", "spills": 1}]
    path.write_text(json.dumps({"triton": "another", "columns": ["arch", "spills"], "rows": rows}))
    with pytest.raises(SystemExit, match="another"):
        rows_of_others(path, ["sm90"])


def test_of_several_main_loops_the_mean_counts():
    from bench.static.offline import Launch

    launch = Launch("product._forward", "gfx1100", None, (1,), [])
    multiply, other = "v_wmma_f32_16x16x16_bf16 v[0:7], v[8:15], v[16:23], v[0:7]", "s_add_u32 s0, s0, 1"

    def loop(label: str, *lines: str) -> list[str]:
        return [f"{label}:", *lines, f"s_cbranch_scc1 {label}"]

    steps = loop(".LBB0_1", multiply, multiply), loop(".LBB0_2", multiply, multiply, other)
    launch.assembly = [*loop(".LBB0_3", *steps[0]), *steps[1], *loop(".LBB0_4", multiply), *loop(".LBB0_5", other)]
    assert launch.main_loops == [step[1:] for step in steps]
    assert launch.loop_length == 4


@pytest.mark.parametrize(
    "change",
    [
        {"spills": 8},
        {"shared": 300_000},
        {"matrix": 0},
        {"matrix kind": "HMMA"},
        {"loop": 106},
        {"arch": "gfx942", "loop": 106},
        {"kernel": "joint._backward", "loop": 106},
        {"kernel": "joint._forward", "loop": 106},
        {"load bits": 64},
        {"kernel": "distill._spread", "variant": "distance, backward", "matrix": 0},
        {"kernel": "distill._difference", "arch": "gfx1100", "type": "float16", "matrix": 0},
    ],
)
def test_each_fault_is_found(change):
    from bench.static.gpu_static import faults

    good = {
        "arch": "sm90", "kernel": "grouped._forward", "variant": "", "type": "bfloat16", "tokens": 128, "spills": 0,
        "shared": 1000, "shared limit": 232_448, "matrix": 4, "matrix kind": "HGMMA", "loop": 105, "plain loop": 100,
        "load bits": 128,
    }  # fmt: skip
    assert not list(faults(good))
    assert len(list(faults(good | change))) == 1
