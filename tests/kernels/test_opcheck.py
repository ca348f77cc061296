"""Every operator on the kernels is what torch.library expects: schema, fake version, autograd, no shared memory."""

from typing import Any

import pytest
import torch
from torch import Tensor

import mlfs.ops.grouped_linear  # noqa: F401  (`import mlfs` registers the others)
from mlfs.ops.backend import use_backend
from tests.calls import example, strided
from tests.devices import move, on_each_device

pytest.importorskip("triton")
pytestmark = on_each_device
OPS = torch.ops.mlfs


def moved(value: Any, device: str, wants: bool = False) -> Any:
    """Tensors on the device, in lists too; those that are floating-point want gradients if `wants`."""
    if isinstance(value, list | tuple):
        return type(value)(moved(v, device, wants) for v in value)
    return move(value, device).requires_grad_(wants) if isinstance(value, Tensor) else value


def check(op: Any, arguments: tuple[Any, ...]) -> None:
    with use_backend("triton"):
        torch.library.opcheck(op.default, arguments)


@pytest.mark.parametrize(
    "options",
    [{"spans": (0, 2, 3, 3, 8, 1), "activation": "gelu", "residual": True}, {"activation": "silu_mul", "stages": 0}],
    ids=["fused, gelu, residual", "gated, no stages"],
)
def test_sliced_linear(device, options):
    call = example(torch.float32, **options)
    x, operand, residual, weights, biases, a, b, scales, spans, activation = call.arguments
    for keep in (False, True):
        leaves = (*moved((x, operand, residual), device, keep), *moved((weights, biases), device))
        check(OPS.sliced_linear, (*leaves, *moved((a, b), device, keep), scales, spans, activation, keep))
    generator = torch.Generator().manual_seed(0)
    dy = strided((*x.shape[:-1], len(call.rows)), "plain", generator, torch.float32)
    h, z = torch.ones(6, sum(t.shape[0] for t in a)), torch.ones(6, len(call.rows))
    trains = [True, False][: len(a)]
    kept = (x, h) if any(trains) else (None, None)
    for needs_dx in (False, True):
        layer = (weights, a, b, scales, spans, trains, needs_dx, x.shape[-1])
        arguments = (dy, *kept, z, operand, *layer, activation)
        check(OPS.sliced_linear_backward, moved(arguments, device))


def test_grouped_sliced_linear(device):
    generator = torch.Generator().manual_seed(0)
    x, weight, bias, dy = (
        strided(size, "plain", generator, torch.float32) for size in ((9, 8), (10, 8), (10,), (9, 10))
    )
    a, b = [strided((3, 8), "plain", generator, torch.float32)], [strided((10, 3), "plain", generator, torch.float32)]
    groups = [0, 4, 8, 0, 4, 5, 3, 0, 0, 5, 3, 5, 0, 2, 4, 1, 0, 0]
    leaves = (moved(x, device, True), *moved(([weight], [bias]), device), *moved((a, b), device, True))
    check(OPS.grouped_sliced_linear, (*leaves, [2.0], [0, 10], groups))
    for trains in (False, True):
        kept = (x, torch.ones(9, 3)) if trains else (None, None)
        arguments = (dy, *kept, [weight], a, b, [2.0], [0, 10], groups, [trains], True)
        check(OPS.grouped_sliced_linear_backward, moved(arguments, device))


@pytest.mark.parametrize("p", [0.0, 0.5])
@pytest.mark.parametrize("residual", [True, False])
def test_add_norm(device, residual, p):
    generator = torch.Generator().manual_seed(0)
    x, more, weight, bias, dy, ds = (
        strided(size, "plain", generator, torch.float32) for size in ((4, 6), (4, 6), (8,), (8,), (4, 6), (4, 6))
    )
    seed = torch.tensor([3], device=device) if p else None
    tensors = moved((x, more if residual else None, weight, bias), device, True)
    check(OPS.add_norm, (*tensors, 1e-5, False, p, seed))
    for trains in (True, False):
        arguments = moved((dy, ds if residual else None, x, weight), device)
        check(OPS.add_norm_backward, (*arguments, 1e-5, True, p, seed, trains))
