"""Every entry of the tables of tile sizes gives the same numbers, in every type; how one is chosen."""

import json

import pytest
import torch
from torch import Tensor

from mlfs.ops.grouped_linear import Group, grouped_sliced_linear_reference
from mlfs.ops.joint_linear import joint_linear_reference
from mlfs.ops.layer import Epilogue, LowRankLinear, Wanted
from mlfs.ops.sliced_linear import sliced_linear_reference
from tests.devices import move

pytest.importorskip("triton")
from mlfs.kernels import configs, grouped, joint, product
from mlfs.kernels.configs import PRODUCT, Config

TOLERANCE = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}
# The interpreter is slow and multiplies in fp32 whatever the type: one type and a few tiles there, all on a GPU.
CASES = [("cpu", torch.float16), *(pytest.param("cuda", kind, marks=pytest.mark.gpu) for kind in TOLERANCE)]
on_each_device_and_type = pytest.mark.parametrize("device, dtype", CASES, ids=str)
GROUPS = (Group(0, 150, 96, (0, 150)), Group(150, 9, 33, (0, 20, 40, 10)), Group(165, 70, 48, (16, 64, 96, 32)))
RANK, SCALES = 5, [2.0, 0.5]


def tables(device: str) -> list[Config]:
    """The device's own entries; in the interpreter the largest, the thinnest and the smallest of other devices'."""
    if device == "cuda":
        return list(PRODUCT[configs.architecture(torch.device(device))])
    return [PRODUCT["sm90"][0], PRODUCT["sm90"][-1], PRODUCT["gfx1100"][-1]]


def tensors(dtype: torch.dtype) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"x": (300, 96), "weight": (150, 96), "bias": (150,), "a0": (RANK, 96), "a1": (RANK, 96),
              "b0": (150, RANK), "b1": (150, RANK), "residual": (300, 140), "dy": (300, 150)}  # fmt: skip
    made = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    for name in ("weight", "a0", "a1"):
        made[name] *= 0.1
    return {name: t if name[0] in "ab" and name != "bias" else t.to(dtype) for name, t in made.items()}


def compare(found: list[Tensor], right: list[Tensor], dtype: torch.dtype, what: object) -> None:
    for i, (mine, exact) in enumerate(zip(found, right, strict=True)):
        error = (mine.cpu().double() - exact).abs().max() / exact.abs().max().clamp_min(1)
        assert error <= TOLERANCE[dtype], f"{what}, result {i}: {error}"


@on_each_device_and_type
@pytest.mark.parametrize("n, spans", [(96, [0, 128]), (91, [3, 100, 110, 33, 145, 2])], ids=["even", "odd"])
def test_every_tile_of_the_sliced_product(device, dtype, n, spans):
    """Epilogues and stages included; what bigger tiles are not given (see `configs.candidates`) they need not take."""
    cpu, m = tensors(dtype), sum(spans[1::2])
    t = {name: move(value, device) for name, value in cpu.items()}
    x, residual, dy = t["x"][:, :n], t["residual"][:, :m], t["dy"][:, :m]
    layer = LowRankLinear(t["weight"], t["bias"], [t["a0"], t["a1"]], [t["b0"], t["b1"]], SCALES, spans)
    wide = {name: value.double() for name, value in cpu.items()}
    leaves = [wide[name].requires_grad_() for name in ("x", "a0", "b0", "a1", "b1")]
    xd, a0, b0, a1, b1 = leaves
    exact = xd[:, :n], LowRankLinear(wide["weight"], wide["bias"], [a0, a1], [b0, b1], SCALES, spans)
    plain = sliced_linear_reference(*exact)
    added = sliced_linear_reference(*exact, Epilogue(residual=wide["residual"][:, :m]))
    gradients = torch.autograd.grad(plain, leaves, wide["dy"][:, :m])
    right = [gradients[0][:, :n], *gradients[1:]]
    for config in tables(device):
        y, h, _ = product.forward(x, layer, config=config)
        dx, gradients = product.backward(dy, x, h, layer, Wanted([True, True], True, n), config=config)
        compare([y, dx, *gradients], [plain, *right], dtype, config)
        if config.block_t * config.block_c <= 128 * 128:
            y, _, _ = product.forward(x, layer, Epilogue(residual=residual), config=config)
            compare([y], [added], dtype, config)


@on_each_device_and_type
def test_every_tile_of_the_grouped_product(device, dtype):
    cpu = tensors(dtype)
    t = {name: move(value, device) for name, value in cpu.items()}
    layer = LowRankLinear(t["weight"], t["bias"], [t["a0"]], [t["b0"]], SCALES[:1], ())
    wide = {name: value.double() for name, value in cpu.items()}
    leaves = [wide[name].requires_grad_() for name in ("x", "a0", "b0")]
    exact = LowRankLinear(wide["weight"], wide["bias"], [leaves[1]], [leaves[2]], SCALES[:1], ())
    goal = grouped_sliced_linear_reference(leaves[0], exact, GROUPS)
    right = torch.autograd.grad(goal, leaves, wide["dy"])
    for config in tables(device):
        if config.block_t * config.block_c <= 128 * 128:
            y, h = grouped.forward(t["x"], layer, GROUPS, config)
            dx, gradients = grouped.backward(t["dy"], t["x"], h, layer, GROUPS, Wanted([True], True, 96), config)
            compare([y, dx, *gradients], [goal, *right], dtype, config)


@on_each_device_and_type
@pytest.mark.parametrize("rows", [(150, 150), (130, 20, 33)], ids=["gated", "three"])
def test_every_tile_of_the_projections_of_one_input(device, dtype, rows):
    cpu, gated = tensors(dtype), len(rows) == 2
    t = {name: move(value, device) for name, value in cpu.items()}
    order, scales = [0, 1, 0][: len(rows)], [2.0, 0.5, 2.0][: len(rows)]
    weights = [t["weight"], t["residual"][:150, :96], t["dy"][:150, :96]]
    given = [
        LowRankLinear(weights[i], t["bias"], [t[f"a{k}"]], [t[f"b{k}"]], [scales[i]], [0, rows[i]])
        for i, k in enumerate(order)
    ]
    wide = {name: value.double() for name, value in cpu.items()}
    exact = [wide["weight"], wide["residual"][:150, :96], wide["dy"][:150, :96]]
    layers = [
        LowRankLinear(exact[i], wide["bias"], [wide[f"a{k}"]], [wide[f"b{k}"]], [scales[i]], [0, rows[i]])
        for i, k in enumerate(order)
    ]
    goals = joint_linear_reference(wide["x"], layers, gated)
    for config in tables(device):
        if config.block_t * config.block_c <= 128 * 128:
            ys, _, _ = joint.forward(t["x"], given, gated, config=config)
            compare(ys[: len(goals)], goals, dtype, config)


@pytest.mark.gpu
def test_tuning_on_the_device_keeps_its_choice(tmp_path, monkeypatch):
    cache = tmp_path / "mlfs" / "tuned.json"
    monkeypatch.setattr(configs, "_cache_file", lambda: cache)
    monkeypatch.delenv("CI", raising=False)
    monkeypatch.setenv("MLFS_TUNE", "1")
    x, weight = (torch.randn(500, 96, device="cuda", dtype=torch.float16) for _ in range(2))
    layer = LowRankLinear(weight, None, [], [], [], [0, 500])
    y = product.forward(x, layer)[0]
    torch.testing.assert_close(y, x @ weight.t(), rtol=5e-3, atol=2e-2)
    (key,) = json.loads(cache.read_text())
    assert key == "product/512x512x128/float16/float16"
    chosen = json.loads(cache.read_text())[key]
    assert Config(**chosen) in PRODUCT[configs.architecture(x.device)]
    monkeypatch.setattr(configs, "_time", lambda *_: pytest.fail("timed again"))
    product.forward(x, layer)
