"""Tensors beyond 2^31 numbers: of virtual memory, of which only the rows in use are ever written."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from mlfs.ops.grouped_linear import Group, grouped_sliced_linear_reference
from mlfs.ops.joint_linear import joint_linear_reference
from mlfs.ops.layer import Epilogue, LowRankLinear, Norm, Wanted
from mlfs.ops.norm import add_norm_reference
from mlfs.ops.rotary import rotary_reference
from mlfs.ops.sliced_linear import sliced_linear_reference
from tests.devices import on_each_device

pytest.importorskip("triton")
from mlfs.kernels import decode, grouped, joint, norm, product, rotary

ROWS, COLUMNS, STRIDE = 40, 48, 2**26
pytestmark = on_each_device


@pytest.fixture(autouse=True)
def in_place(monkeypatch, device) -> Iterator[None]:
    """The interpreter works on CPU tensors in place, then copies each storage onto itself: gigabytes, for nothing."""
    if device == "cpu":
        from triton.runtime.interpreter import GridExecutor

        monkeypatch.setattr(GridExecutor, "_restore_args_dev", lambda *_: None)
    yield
    if device == "cuda":
        torch.cuda.empty_cache()


def far(rows: int, columns: int, device: str, seed: int) -> Tensor:
    """Random numbers (rows, columns) in fp16 whose last row starts beyond 2^31 numbers."""
    try:
        t = torch.empty_strided((rows, columns), (STRIDE, 1), dtype=torch.float16, device=device)
    except (RuntimeError, torch.OutOfMemoryError) as error:
        pytest.skip(f"no {rows * STRIDE * 2 >> 30} GB of address space: {error}")
    assert t.stride(0) * (rows - 1) > 2**31
    return t.copy_(torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) / 4)


def near(*shape: int, device: str, seed: int) -> Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) / 4).to(device)


def wide(*tensors: Tensor) -> list[Tensor]:
    """The same in float64 on the CPU, as new leaves."""
    return [t.cpu().double().contiguous().requires_grad_() for t in tensors]


def agree(found: list[Tensor], right: list[Tensor]) -> None:
    for mine, exact in zip(found, right, strict=True):
        assert (mine.cpu().double() - exact).abs().max() <= 3e-3 * exact.abs().max()


@pytest.mark.parametrize("transposed", [False, True])
def test_sliced_product(device, transposed):
    weight = far(ROWS, COLUMNS, device, 0)
    weight = weight.t() if transposed else weight
    m, n = weight.shape
    x, dy, residual = (far(ROWS, k, device, 1 + i) for i, k in enumerate((n, m, m)))
    a, b = near(4, n, device=device, seed=4), near(m, 4, device=device, seed=5)
    layer = LowRankLinear(weight, None, [a], [b], [2.0], [0, m])
    y, h, z = product.forward(x, layer, Epilogue("gelu", residual=residual), keep_pre=True)
    dz, _ = product.activation_backward(dy, z, None, "gelu")
    dx, gradients = product.backward(dz, x, h, layer, Wanted([True], True, n))
    xd, wd, ad, bd, rd = wide(x, weight, a, b, residual)
    exact = LowRankLinear(wd, None, [ad], [bd], [2.0], [0, m])
    goal = sliced_linear_reference(xd, exact, Epilogue("gelu", residual=rd))
    agree([y, dx, *gradients], [goal, *torch.autograd.grad(goal, (xd, ad, bd), dy.cpu().double())])
    few = decode.forward(x[24:], layer, Epilogue("gelu", residual=residual[24:]))
    agree([few], [goal[24:]])


def test_sliced_product_of_gradients_and_gates_that_far_apart(device):
    dy, z, operand = (far(ROWS, COLUMNS, device, i) for i in range(3))
    found = product.activation_backward(dy, z, operand, "silu_mul")
    zd, od = wide(z, operand)
    right = torch.autograd.grad(torch.nn.functional.silu(zd) * od, (zd, od), dy.cpu().double())
    agree([t for t in found if t is not None], list(right))


def test_several_sizes_in_one_launch(device):
    weight, x, dy = (far(ROWS, k, device, i) for i, k in enumerate((COLUMNS, COLUMNS, ROWS)))
    a, b = near(4, COLUMNS, device=device, seed=4), near(ROWS, 4, device=device, seed=5)
    groups = (Group(0, 20, 48, (0, 40)), Group(20, 19, 31, (3, 15, 30, 10)))
    layer = LowRankLinear(weight, None, [a], [b], [2.0], ())
    y, h = grouped.forward(x, layer, groups)
    dx, gradients = grouped.backward(dy, x, h, layer, groups, Wanted([True], True, COLUMNS))
    xd, wd, ad, bd = wide(x, weight, a, b)
    goal = grouped_sliced_linear_reference(xd, LowRankLinear(wd, None, [ad], [bd], [2.0], ()), groups)
    agree([y, dx, *gradients], [goal, *torch.autograd.grad(goal, (xd, ad, bd), dy.cpu().double())])


@pytest.mark.parametrize("rms", [False, True])
def test_norm(device, rms):
    x, residual, dy, ds = (far(ROWS, COLUMNS, device, i) for i in range(4))
    weight = near(COLUMNS, device=device, seed=5)
    y, s = norm.forward(x, residual, Norm(weight, None, 1e-5, rms), dtype=torch.float16)
    dx, _, dw, _ = norm.backward(dy, ds, s, Norm(weight, None, 1e-5, rms), trains=True)
    xd, rd, wd = wide(x, residual, weight)
    goal, carried = add_norm_reference(xd, rd, Norm(wd, None, 1e-5, rms))
    total = (goal * dy.cpu().double()).sum() + (carried * ds.cpu().double()).sum()
    assert dw is not None
    agree([y, s, dx, dw], [goal, carried, *torch.autograd.grad(total, (xd, wd))])


def test_rotary(device):
    one, other = (far(ROWS, COLUMNS, device, i) for i in range(2))
    q, k = one.view(1, ROWS, 4, 12), other.as_strided((2, 10, 2, 12), (20 * STRIDE, STRIDE, 12, 1))
    cos, sin = (near(1, ROWS, 12, device=device, seed=i) for i in (2, 3))
    few = q[:, :10].expand(2, -1, -1, -1), k, cos[:, :10], sin[:, :10]
    for given in ((q, q, cos, sin), few):
        agree(list(rotary.rotary(*given, torch.float16)), [*rotary_reference(*wide(*given))])


def test_projections_of_one_input(device):
    weights, dys = ([far(ROWS, COLUMNS, device, i + k) for i in range(2)] for k in (0, 2))
    x, dys = far(ROWS, COLUMNS, device, 4), [dy[:, :ROWS] for dy in dys]
    a, b = (
        [near(*shape, device=device, seed=i + k) for i in range(2)] for k, shape in ((5, (4, COLUMNS)), (7, (ROWS, 4)))
    )
    given = [LowRankLinear(weights[i], None, [a[i]], [b[i]], [(2.0, 0.5)[i]], [0, ROWS]) for i in range(2)]
    ys, h, _ = joint.forward(x, given, keep=True)
    dx, found = joint.backward(dys, x, h, given, Wanted([True] * 2, True, COLUMNS))
    xd, w0, w1, a0, a1, b0, b1 = wide(x, *weights, *a, *b)
    layers = [
        LowRankLinear(w0, None, [a0], [b0], [2.0], [0, ROWS]),
        LowRankLinear(w1, None, [a1], [b1], [0.5], [0, ROWS]),
    ]
    goals = joint_linear_reference(xd, layers)
    gradients = torch.autograd.grad(goals, (xd, a0, b0, a1, b1), [dy.cpu().double() for dy in dys])
    agree([*ys, dx, *found], [*goals, *gradients])
