"""Each kernel's machine code for gfx1100, executed on a CPU and compared with the reference in float64.

    TINYGRAD=<a checkout of tinygrad> python -m tests.kernels.emulated_cases sliced_linear float16 0

Run by test_emulated.py in processes of their own, as Triton's interpreter and its compiler cannot both be used in one.
Sizes are small, since each instruction is emulated, but cross every tile edge.
"""

import sys
from unittest import mock

import torch
from torch import Tensor

from bench.static.offline import offline
from mlfs.kernels import decode, distill, grouped, joint, norm, product, reductions, rotary
from mlfs.kernels.configs import PRODUCT, Config
from mlfs.ops.grouped_linear import Group, grouped_sliced_linear_reference
from mlfs.ops.joint_linear import joint_linear_reference
from mlfs.ops.layer import Activated, Dropout, Epilogue, LowRankLinear, Norm, Wanted
from mlfs.ops.norm import add_norm_reference
from mlfs.ops.rotary import rotary_reference
from mlfs.ops.sliced_linear import finish, sliced_linear_reference
from tests.emulator import ARCH, emulate

CONFIGS = PRODUCT[ARCH][1:]
TOLERANCE = {"float16": 4e-3, "bfloat16": 3e-2}


def randn(*size: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
    return (torch.randn(size) * scale).to(dtype)


def run_sliced_linear(dtype: torch.dtype, config: Config) -> list[tuple[Tensor, Tensor]]:
    tokens, n, spans, rank = 37, 44, [3, 40, 50, 9], 5
    m = sum(spans[1::2])
    x, weight, bias = randn(tokens, n, dtype=dtype), randn(64, 48, dtype=dtype, scale=0.15), randn(64, dtype=dtype)
    a, b = [randn(rank, 48, scale=0.15) for _ in range(2)], [randn(64, rank, scale=0.5) for _ in range(2)]
    scales, residual, dy = [2.0, 0.5], randn(tokens, m, dtype=dtype), randn(tokens, m, dtype=dtype)
    layer = LowRankLinear(weight, bias, a, b, scales, spans)
    with offline(ARCH, emulate):
        y, h, z = product.forward(x, layer, Epilogue("gelu", residual=residual), True, config)
        dz, _ = product.activation_backward(dy, z, None, "gelu")
        dx, found = product.backward(dz, x, h, layer, Wanted([True, True], True, n), config=config)
        with mock.patch.object(reductions, "_in_one_pass", return_value=True):  # as other GPUs do
            _, again = product.backward(dz, x, h, layer, Wanted([True, True], False, n), config=config)
    exact = [t.double().requires_grad_() for t in (x, *a, *b)]
    xd, ad, bd = exact[0], exact[1:3], exact[3:]
    exact_layer = LowRankLinear(weight.double(), bias.double(), ad, bd, scales, spans)
    goal = sliced_linear_reference(xd, exact_layer, Epilogue("gelu", residual=residual.double()))
    goal.backward(dy.double())
    order = [ad[0].grad, bd[0].grad, ad[1].grad, bd[1].grad]
    return [(y, goal), (dx, xd.grad), *zip(found, order, strict=True), *zip(again, order, strict=True)]


def run_feed_forward(dtype: torch.dtype, config: Config) -> list[tuple[Tensor, Tensor]]:
    """Backward through an activation, whose output is made again for dA; and with a residual added to dx. The two
    cases are gated pairs of sizes that fill tiles, and GELU of sizes that do not."""
    tokens, n, m, activation = (37, 64, 64, "silu_mul") if config == CONFIGS[0] else (37, 45, 50, "gelu")
    z, up, more = (randn(tokens, n, dtype=dtype) for _ in range(3))
    weight, dy = randn(m + 3, n + 3, dtype=dtype, scale=0.15), randn(tokens, m, dtype=dtype)
    lora = [randn(8, n + 3, scale=0.15)], [randn(m + 3, 8, scale=0.5)], [2.0], [0, m]
    zd, ud, ad, bd = (t.double().requires_grad_() for t in (z, up, lora[0][0], lora[1][0]))
    x = finish(zd, Epilogue(activation, ud if activation == "silu_mul" else None))
    given = x.detach().to(dtype)
    h = (2.0 * given.double() @ lora[0][0][:, :n].double().t()).to(dtype)
    goal = sliced_linear_reference(x, LowRankLinear(weight.double(), None, [ad], [bd], *lora[2:]))
    wanted = [zd, *([ud] if activation == "silu_mul" else []), ad, bd, x]
    *gradients, dx = torch.autograd.grad(goal, wanted, dy.double())
    layer, learns = LowRankLinear(weight, None, *lora), Wanted([True], True, n)
    activated = Activated(activation, z, up if activation == "silu_mul" else None)
    with offline(ARCH, emulate):
        dz, d_up, found = product.backward_through_activation(dy, None, h, layer, learns, activated, config)
        added, _ = product.backward(dy, given, h, layer, learns, more, config)
    through = [dz] if d_up is None else [dz, d_up]
    return [*zip([*through, *found], gradients, strict=True), (added, dx + more.double())]


def run_grouped(dtype: torch.dtype, config: Config) -> list[tuple[Tensor, Tensor]]:
    """The two cases are sizes that are aligned and fill each step of a loop, and sizes that do neither."""
    groups = (Group(0, 35, 48, (0, 64)), Group(35, 9, 33, (0, 20, 40, 10)), Group(46, 4, 16, (0, 16)))
    if config == CONFIGS[0]:
        groups = (Group(0, 35, 64, (0, 64)), Group(35, 9, 32, (0, 32)), Group(46, 4, 32, (32, 32)))
    x, weight, bias = randn(52, 64, dtype=dtype), randn(64, 64, dtype=dtype, scale=0.15), randn(64, dtype=dtype)
    a, b, scales = [randn(4, 64, scale=0.15)], [randn(64, 4, scale=0.5)], [2.0]
    dy = randn(52, 64, dtype=dtype)
    layer = LowRankLinear(weight, bias, a, b, scales, ())
    with offline(ARCH, emulate):
        y, h = grouped.forward(x, layer, groups, config)
        dx, found = grouped.backward(dy, x, h, layer, groups, Wanted([True], True, 64), config)
    xd, ad, bd = (t.double().requires_grad_() for t in (x, a[0], b[0]))
    exact_layer = LowRankLinear(weight.double(), bias.double(), [ad], [bd], scales, ())
    goal = grouped_sliced_linear_reference(xd, exact_layer, groups)
    goal.backward(dy.double())
    return [(y, goal), (dx, xd.grad), *zip(found, (ad.grad, bd.grad), strict=True)]


def run_joint(dtype: torch.dtype, config: Config) -> list[tuple[Tensor, Tensor]]:
    """The two cases are three layers, and a gated pair of two stages; their rows fill no tile."""
    gated = config == CONFIGS[0]
    tokens, n, rows, stages = (37, 64, [72, 72], 2) if gated else (37, 45, [50, 33, 9], 1)
    x, weights = randn(tokens, n, dtype=dtype), [randn(m + 3, n + 3, dtype=dtype, scale=0.15) for m in rows]
    biases, scales = [randn(m + 3, dtype=dtype) for m in rows], [2.0, 0.5][:stages] * len(rows)
    a = [randn(8, n + 3, scale=0.15) for _ in rows for _ in range(stages)]
    b = [randn(m + 3, 8, scale=0.5) for m in rows for _ in range(stages)]
    dys = [randn(tokens, m, dtype=dtype) for m in (rows[:1] if gated else rows)]
    residual = randn(tokens, n, dtype=dtype)
    of_layer = [slice(i * stages, (i + 1) * stages) for i in range(len(rows))]
    given = [
        LowRankLinear(weights[i], biases[i], a[own], b[own], scales[own], [0, rows[i]])
        for i, own in enumerate(of_layer)
    ]
    with offline(ARCH, emulate):
        ys, h, z = joint.forward(x, given, gated, True, config)
        ds = dys
        if gated:
            ds = [d for d in product.activation_backward(dys[0], z, ys[1], "silu_mul") if d is not None]
        found_dx, found = joint.backward(ds, x, h, given, Wanted([True] * len(a), True, n), residual, config)
    xd, *pairs = (t.double().requires_grad_() for t in (x, *(t for pair in zip(a, b, strict=True) for t in pair)))
    layers = [
        LowRankLinear(w.double(), bias.double(), pairs[2 * i * stages : 2 * (i + 1) * stages : 2],
                   pairs[2 * i * stages + 1 : 2 * (i + 1) * stages : 2], scales[:stages], [0, m])
        for i, (w, bias, m) in enumerate(zip(weights, biases, rows, strict=True))
    ]  # fmt: skip
    goals = joint_linear_reference(xd, layers, gated)
    dx, *gradients = torch.autograd.grad(goals, [xd, *pairs], [dy.double() for dy in dys])
    pairs_of_x = [*zip(ys[: len(goals)], goals, strict=True), (found_dx, dx + residual.double())]
    return [*pairs_of_x, *zip(found, gradients, strict=True)]


def run_decode(dtype: torch.dtype, config: Config) -> list[tuple[Tensor, Tensor]]:
    """Its tiles are its own; the two cases are one token over aligned sizes, and several over odd ones."""
    tokens, n, spans = (1, 96, [0, 80]) if config == CONFIGS[0] else (7, 75, [0, 33, 40, 30])
    x, weight, bias = randn(tokens, n, dtype=dtype), randn(80, 96, dtype=dtype, scale=0.1), randn(80, dtype=dtype)
    a, b, scales = [randn(8, 96, scale=0.1) for _ in range(3)], [randn(80, 8, scale=0.5) for _ in range(3)], [2.0] * 3
    operand = randn(tokens, sum(spans[1::2]), dtype=dtype)
    with offline(ARCH, emulate):
        y = decode.forward(x, LowRankLinear(weight, bias, a, b, scales, spans), Epilogue("silu_mul", operand))
    exact = [[t.double() for t in stages] for stages in (a, b)]
    exact_layer = LowRankLinear(weight.double(), bias.double(), *exact, scales, spans)
    return [(y, sliced_linear_reference(x.double(), exact_layer, Epilogue("silu_mul", operand.double())))]


def run_norm(dtype: torch.dtype, config: Config) -> list[tuple[Tensor, Tensor]]:
    """Its tiles are its own; the two cases are RMSNorm, and LayerNorm with residual and dropout."""
    rms, p = config == CONFIGS[0], 0.0 if config == CONFIGS[0] else 0.3
    x, residual, weight, bias = (randn(*size, dtype=dtype) for size in ((21, 45), (21, 45), (50,), (50,)))
    residual, bias = (None, None) if rms else (residual, bias)
    seed, dy, ds = torch.tensor([987654321987]), randn(21, 45, dtype=dtype), randn(21, 45, dtype=dtype)
    with offline(ARCH, emulate):
        y, s = norm.forward(x, residual, Norm(weight, bias, 1e-5, rms), Dropout(p, seed))
        dx, d_residual, dw, db = norm.backward(dy, ds, s, Norm(weight, bias, 1e-5, rms), Dropout(p, seed), True)
        drawn = (
            norm.forward(torch.ones_like(x), None, Norm(weight, None, 1e-5, rms), Dropout(p, seed))[1]
            if p
            else torch.ones(21, 45)
        )
    kept = (drawn > 0) / (1 - p)
    assert p == 0 or 0.5 < (kept > 0).double().mean() < 0.9
    wide = [None if t is None else t.double().requires_grad_() for t in (x, residual, weight, bias)]
    xd, rd, wd, bd = wide
    assert xd is not None and wd is not None
    goal, carried = add_norm_reference(xd * kept, rd, Norm(wd, bd, 1e-5, rms))
    ((goal * dy.double()).sum() + (carried * ds.double()).sum()).backward()
    assert xd.grad is not None and wd.grad is not None and dw is not None and db is not None
    pairs = [(y, goal), (s, carried), (dx, xd.grad), (dw, wd.grad[:45])]
    if rd is not None and bd is not None:
        assert rd.grad is not None and bd.grad is not None
        pairs += [(d_residual, rd.grad), (db, bd.grad[:45])]
    return pairs


def run_rotary(dtype: torch.dtype, config: Config) -> list[tuple[Tensor, Tensor]]:
    """Its tiles are its own; the two cases are aligned heads, and odd ones with angles of their own for each row."""
    rows, heads, groups, dim = (1, 4, 4, 32) if config == CONFIGS[0] else (2, 7, 2, 10)
    q, k = (randn(2, count, 3, dim, dtype=dtype).transpose(1, 2) for count in (heads, groups))
    angles = randn(rows, 3, dim)
    with offline(ARCH, emulate):
        turned = rotary.rotary(q, k, angles.cos(), angles.sin(), dtype)
        back = rotary.rotary(*turned, angles.cos(), angles.sin(), torch.float32, backward=True)
    exact = [t.double().requires_grad_() for t in (q, k)]
    goal = rotary_reference(*exact, angles.cos().double(), angles.sin().double())
    gradients = torch.autograd.grad(goal, exact, [t.double() for t in turned])
    return list(zip((*turned, *back), (*goal, *gradients), strict=True))


def run_distill(dtype: torch.dtype, config: Config) -> list[tuple[Tensor, Tensor]]:
    """Its blocks are its own; the two cases are an odd vocabulary without, and one of two blocks with a teacher."""
    teaches = config != CONFIGS[0]
    vocabulary, n, full, size = (2085, 44, 48, 7) if teaches else (77, 48, 48, 16)
    z, u = randn(3, 2112, dtype=dtype, scale=3)[:, :vocabulary], randn(3, 2112, dtype=dtype, scale=3)[:, :vocabulary]
    labels, sums, mask = torch.tensor([5, -100, vocabulary - 1]), torch.zeros(2, 3), torch.arange(37) % 3 > 0
    alpha, temperature, smoothing = (0.6, 2.0, 0.1) if teaches else (0.0, 1.0, 0.0)
    student, teacher = randn(37, n, dtype=dtype), randn(37, full, dtype=dtype)
    projection, scale = randn(size, full, scale=0.15), torch.tensor(0.5)
    exact = z.double()[[0, 2]].requires_grad_()
    task = torch.nn.functional.cross_entropy(exact, labels[[0, 2]], reduction="none", label_smoothing=smoothing)
    log_p, log_r = (torch.log_softmax(t / temperature, -1) for t in (u.double()[[0, 2]], exact))
    distance = temperature**2 * (log_p.exp() * (log_p - log_r)).sum(-1) * teaches
    ((1 - alpha) * task + alpha * distance).sum().backward()
    with offline(ARCH, emulate):
        distill.head_rows(z, u if teaches else None, labels, sums, alpha, temperature, smoothing, True)
        _, _, d = distill.difference(student, teacher, projection, mask, True)
        dx = distill.spread(d, projection, scale, n, dtype)
    wide = projection.double()
    goal = (student.double() @ wide[:, :n].t() - teacher.double() @ wide.t()) * mask.unsqueeze(1)
    pairs = [(sums[:, [0, 2]], torch.stack([task, distance]).detach()), (z[[0, 2]], exact.grad)]
    return [*pairs, (z[1], torch.zeros_like(z[1]).double()), (d, goal), (dx, 0.5 * goal @ wide[:, :n])]


CASES = {
    "sliced_linear": run_sliced_linear,
    "feed_forward": run_feed_forward,
    "grouped": run_grouped,
    "joint": run_joint,
    "decode": run_decode,
    "norm": run_norm,
    "rotary": run_rotary,
    "distill": run_distill,
}


def main(name: str, dtype: str, config: str) -> None:
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)  # new memory is NaN until it is written
    for i, (mine, exact) in enumerate(CASES[name](getattr(torch, dtype), CONFIGS[int(config)])):
        error = (mine.double() - exact).abs().max() / exact.abs().max().clamp_min(1e-3)
        print(f"{name} {dtype} {CONFIGS[int(config)]} result {i}: {error.item():.2e}")
        assert error <= TOLERANCE[dtype], i


if __name__ == "__main__":
    main(*sys.argv[1:])
