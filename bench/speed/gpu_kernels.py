"""Cases of bench.speed.gpu: one operator at a time, at the sizes it has in real models."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from bench.speed.gpu_timing import Case, Contender
from mlfs.ops import divergence, layer_norm, rms_norm, sliced_linear
from mlfs.ops.backend import use_backend
from mlfs.ops.feed_forward import feed_forward, feed_forward_reference
from mlfs.ops.grouped_linear import Group, grouped_sliced_linear
from mlfs.ops.joint_linear import joint_linear
from mlfs.ops.layer import Epilogue, LowRankLinear, Norm
from mlfs.ops.norm import add_norm
from mlfs.ops.rotary import rotary

RANK, SCALE = 8, 2.0
# (tokens, W's rows, W's columns): feed-forward and square projections of each model, at a training batch
SHAPES = {
    "BERT-base": (4096, [(768, 768), (3072, 768), (768, 3072)]),
    "SmolLM2-135M": (4096, [(576, 576), (192, 576), (1536, 576), (576, 1536)]),
    "Llama-7B": (2048, [(4096, 4096), (11008, 4096), (4096, 11008)]),
}
TINY = {"tiny": (20, [(48, 32)])}
SHARES = {"full": 1.0, "half": 0.5}


def cases(device: str, dtypes: list[torch.dtype], tiny: bool, quick: bool) -> Iterator[Case]:
    """All of them; `quick`: of each model the widest projection, at half its size, and no 3 stages."""
    for dtype in dtypes:
        for model, (tokens, shapes) in (TINY if tiny else SHAPES).items():
            for rows, columns in [max(shapes)] if quick else shapes:
                for share, part in list(SHARES.items())[quick:]:
                    m, n = int(rows * part), int(columns * part)
                    size = f"{model} {rows}x{columns}, {share}"
                    for stages in (1,) if quick else (1, 3):
                        yield _product(device, dtype, size, tokens, (rows, columns, m, n), stages, trains=True)
                    for few in (1, 16):
                        yield _product(device, dtype, size, few, (rows, columns, m, n), 1, trains=False)
            rows, columns = max(shapes)
            yield _several(device, dtype, f"{model} {rows}x{columns}", tokens, rows, columns)
            width = min(shapes[0])
            yield _together(device, dtype, f"{model} 3 x {shapes[0][0]}x{shapes[0][1]}", tokens, *shapes[0])
            yield _feed_forward(device, dtype, f"{model} {rows}x{columns}", tokens, rows, columns, model != "BERT-base")
            yield _rotary(device, dtype, f"{model} {width}", tokens, width)
            yield _norm(device, dtype, f"{model} {width}", tokens, width, rms=model != "BERT-base")
            yield _dropout_add_norm(device, dtype, f"{model} {width}", tokens, width)
        vocabulary, tokens = (50, 8) if tiny else (49152, 2048)
        yield _divergence(device, dtype, tokens, vocabulary)


def _contender(
    forward: Callable[[], Tensor],
    wanted: list[Tensor],
    dy: Tensor | None,
    backend: str = "triton",
    compared: bool = True,
) -> Contender:
    """Forward, and backward too where there is a dy, with our operators on that backend."""

    def run() -> Any:
        if dy is None:
            return look()
        with use_backend(backend):
            return torch.autograd.grad(forward(), wanted, dy)

    def look() -> Tensor:
        with use_backend(backend), torch.no_grad():
            return forward()

    return Contender(run, look if compared else None)


def _product(
    device: str, dtype: torch.dtype, size: str, tokens: int, sizes: tuple[int, int, int, int], stages: int, trains: bool
) -> Case:
    rows, columns, m, n = sizes
    rank = stages * RANK

    def build() -> dict[str, Contender]:
        x, weight = _randn(tokens, n, device=device, dtype=dtype), _randn(rows, columns, device=device, dtype=dtype)
        a = [_randn(RANK, columns, device=device) for _ in range(stages)]
        b = [_randn(rows, RANK, device=device) for _ in range(stages)]
        dy = _randn(tokens, m, device=device, dtype=dtype) if trains else None
        trained = [t.requires_grad_(trains) for t in (a[-1], b[-1])]
        x.requires_grad_(trains)
        layer = LowRankLinear(weight, None, a, b, [SCALE] * stages, [0, m])
        small = weight[:m, :n].clone()
        low = [(p[:, :n].detach().to(dtype), q[:m].detach().to(dtype)) for p, q in zip(a, b, strict=True)]
        leaves = [t.clone().requires_grad_(trains) for t in low[-1]]

        def ours() -> Tensor:
            return sliced_linear(x, layer)

        def copied() -> Tensor:
            y = functional.linear(x, weight[:m, :n].clone(memory_format=torch.contiguous_format))
            for p, q in [*low[:-1], tuple(leaves)]:
                y = y + SCALE * functional.linear(functional.linear(x, p), q)
            return y

        def plain() -> Tensor:
            return functional.linear(x, small)

        found = {
            "mlfs": _contender(ours, [x, *trained], dy),
            "cuBLAS + adapters": _contender(ours, [x, *trained], dy, "reference"),
            "copied slice": _contender(copied, [x, *leaves], dy),
            "no adapter": _contender(plain, [x], dy, compared=False),
        }
        if stages == 1:
            layer_of_peft = _peft(small, *leaves)
            wanted = [x, *(p for p in layer_of_peft.parameters() if p.requires_grad)]
            found["PEFT"] = _contender(lambda: layer_of_peft(x), wanted, dy)
        return found

    once, adapters = 2 * tokens * m * n, 2 * tokens * rank * (n + m)
    moved = (tokens * n + m * n + tokens * m) * dtype.itemsize
    what = f"linear, {stages} stage{'s' * (stages > 1)}, forward + backward" if trains else "linear, inference"
    return Case(
        "kernels", f"{what}, {size}, {tokens} tokens", dtype, build,
        flops=2 * once + 2 * adapters + adapters // stages if trains else once + adapters,
        bytes=2 * moved + tokens * n * dtype.itemsize if trains else moved,
    )  # fmt: skip


def _peft(weight: Tensor, a: Tensor, b: Tensor) -> nn.Module:
    """PEFT's LoRA layer with these numbers, its adapters in the base's type: the faster of its two ways."""
    from peft import LoraConfig
    from peft.tuners.lora.layer import Linear

    base = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device=weight.device, dtype=weight.dtype)
    base.weight.data = weight
    base.requires_grad_(False)
    config = LoraConfig(r=RANK, lora_alpha=int(SCALE * RANK), lora_dropout=0.0)
    layer = Linear(base, "default", config, r=RANK, lora_alpha=int(SCALE * RANK)).to(weight.device, weight.dtype)
    layer.lora_A["default"].weight.data.copy_(a)
    layer.lora_B["default"].weight.data.copy_(b)
    return layer


def _several(device: str, dtype: torch.dtype, size: str, tokens: int, rows: int, columns: int) -> Case:
    """A quarter of the tokens at each of four sizes."""
    parts, each = (1.0, 0.75, 0.5, 0.5), tokens // 4
    groups = [Group(i * each, each, int(columns * p), (0, int(rows * p))) for i, p in enumerate(parts)]

    def build() -> dict[str, Contender]:
        x = _randn(4 * each, columns, device=device, dtype=dtype).requires_grad_()
        weight = _randn(rows, columns, device=device, dtype=dtype)
        a = _randn(RANK, columns, device=device).requires_grad_()
        b = _randn(rows, RANK, device=device).requires_grad_()
        dy = _randn(4 * each, rows, device=device, dtype=dtype)
        layer = LowRankLinear(weight, None, [a], [b], [SCALE], [0, rows])

        def ours() -> Tensor:
            return grouped_sliced_linear(x, layer, groups)

        def one_by_one() -> Tensor:
            found = []
            for group in groups:
                y = sliced_linear(x[group.rows, : group.n], layer._replace(spans=group.spans))
                found.append(functional.pad(y, (0, rows - y.shape[1])))
            return torch.cat(found)

        def whole() -> Tensor:
            return sliced_linear(x, layer)

        return {
            "mlfs": _contender(ours, [x, a, b], dy),
            "one by one": _contender(one_by_one, [x, a, b], dy),
            "cuBLAS + adapters": _contender(ours, [x, a, b], dy, "reference"),
            "all at full size": _contender(whole, [x, a, b], dy, compared=False),
        }

    flops = sum(4 * g.tokens * g.n * g.spans[1] + 6 * g.tokens * RANK * (g.n + g.spans[1]) for g in groups)
    return Case("kernels", f"4 sizes at once, forward + backward, {size}, {tokens} tokens", dtype, build, flops=flops)


def _together(device: str, dtype: torch.dtype, size: str, tokens: int, rows: int, columns: int) -> Case:
    """Query, key and value of one x, whose gradients meet in it."""

    def build() -> dict[str, Contender]:
        x = _randn(tokens, columns, device=device, dtype=dtype).requires_grad_()
        layers = [
            LowRankLinear(
                _randn(rows, columns, device=device, dtype=dtype), None,
                [_randn(RANK, columns, device=device).requires_grad_()],
                [_randn(rows, RANK, device=device).requires_grad_()], [SCALE], [0, rows],
            )
            for _ in range(3)
        ]  # fmt: skip
        dy = _randn(tokens, 3 * rows, device=device, dtype=dtype)
        wanted = [x, *(t for layer in layers for t in (*layer.lora_a, *layer.lora_b))]

        def ours() -> Tensor:
            return torch.cat(joint_linear(x, layers), 1)

        def one_by_one() -> Tensor:
            return torch.cat([sliced_linear(x, layer) for layer in layers], 1)

        return {
            "mlfs": _contender(ours, wanted, dy),
            "one by one": _contender(one_by_one, wanted, dy),
            "cuBLAS + adapters": _contender(one_by_one, wanted, dy, "reference"),
        }

    flops = 3 * (4 * tokens * rows * columns + 6 * tokens * RANK * (rows + columns))
    return Case("kernels", f"3 layers of one x, forward + backward, {size}, {tokens} tokens", dtype, build, flops=flops)


def _feed_forward(
    device: str, dtype: torch.dtype, size: str, tokens: int, rows: int, columns: int, gated: bool
) -> Case:
    """The block with its residual: activation and sums in the products, against calls layer by layer."""

    def build() -> dict[str, Contender]:
        x = _randn(tokens, columns, device=device, dtype=dtype).requires_grad_()
        shapes = [(rows, columns)] * (1 + gated) + [(columns, rows)]
        layers = [
            LowRankLinear(
                _randn(m, n, device=device, dtype=dtype), None, [_randn(RANK, n, device=device).requires_grad_()],
                [_randn(m, RANK, device=device).requires_grad_()], [SCALE], [0, m],
            )
            for m, n in shapes
        ]  # fmt: skip
        dy, activation = _randn(tokens, columns, device=device, dtype=dtype), "silu_mul" if gated else "gelu"
        wanted = [x, *(t for layer in layers for t in (*layer.lora_a, *layer.lora_b))]

        def ours() -> Tensor:
            return feed_forward(x, layers, activation, x)[0]

        def one_by_one() -> Tensor:
            *ups, down = layers
            operand = sliced_linear(x, ups[-1]) if gated else None
            activated = sliced_linear(x, ups[0], Epilogue(activation, operand))
            return sliced_linear(activated, down, Epilogue(residual=x))

        def plain() -> Tensor:
            return feed_forward_reference(x, layers, activation, x)

        return {
            "mlfs": _contender(ours, wanted, dy),
            "one by one": _contender(one_by_one, wanted, dy),
            "cuBLAS + adapters": _contender(one_by_one, wanted, dy, "reference"),
            "PyTorch": _contender(plain, wanted, dy),
        }

    flops = (2 + gated) * (4 * tokens * rows * columns + 6 * tokens * RANK * (rows + columns))
    return Case("kernels", f"feed-forward, forward + backward, {size}, {tokens} tokens", dtype, build, flops=flops)


def _rotary(device: str, dtype: torch.dtype, size: str, tokens: int, width: int) -> Case:
    dim = min(64, width // 2)

    def build() -> dict[str, Contender]:
        q, k = (_randn(1, tokens, width // dim, dim, device=device, dtype=dtype).requires_grad_() for _ in range(2))
        cos, sin = (_randn(1, tokens, dim, device=device, dtype=dtype) for _ in range(2))
        dy = _randn(1, tokens, 2 * (width // dim), dim, device=device, dtype=dtype)

        def ours() -> Tensor:
            return torch.cat(rotary(q, k, cos, sin), 2)

        return {"mlfs": _contender(ours, [q, k], dy), "torch": _contender(ours, [q, k], dy, "reference")}

    moved = 8 * tokens * width * dtype.itemsize
    return Case("kernels", f"rotary, forward + backward, {size}, {tokens} tokens", dtype, build, bytes=moved)


def _norm(device: str, dtype: torch.dtype, size: str, tokens: int, width: int, rms: bool) -> Case:
    def build() -> dict[str, Contender]:
        x = _randn(tokens, width, device=device, dtype=dtype).requires_grad_()
        weight, bias = (_randn(width, device=device, dtype=dtype) for _ in range(2))
        dy = _randn(tokens, width, device=device, dtype=dtype)

        def ours() -> Tensor:
            return rms_norm(x, weight, 1e-6) if rms else layer_norm(x, weight, bias, 1e-6)

        def torchs() -> Tensor:
            if rms:
                return functional.rms_norm(x, (width,), weight, 1e-6)
            return functional.layer_norm(x, (width,), weight, bias, 1e-6)

        return {"mlfs": _contender(ours, [x], dy), "torch": _contender(torchs, [x], dy)}

    name = f"{'RMSNorm' if rms else 'LayerNorm'}, forward + backward, {size}, {tokens} tokens"
    return Case("kernels", name, dtype, build, bytes=5 * tokens * width * dtype.itemsize)


def _dropout_add_norm(device: str, dtype: torch.dtype, size: str, tokens: int, width: int) -> Case:
    def build() -> dict[str, Contender]:
        x, residual = (_randn(tokens, width, device=device, dtype=dtype).requires_grad_() for _ in range(2))
        weight, bias = (_randn(width, device=device, dtype=dtype) for _ in range(2))
        dy, seed = _randn(tokens, width, device=device, dtype=dtype), torch.ones(1, dtype=torch.int64, device=device)

        def ours() -> Tensor:
            return add_norm(x, residual, Norm(weight, bias, 1e-6, rms=False), 0.1, seed)[0]

        def torchs() -> Tensor:
            return functional.layer_norm(residual + functional.dropout(x, 0.1), (width,), weight, bias, 1e-6)

        wanted = [x, residual]  # each draws its own mask
        return {"mlfs": _contender(ours, wanted, dy, compared=False),
                "torch": _contender(torchs, wanted, dy, compared=False)}  # fmt: skip

    name = f"dropout + residual + LayerNorm, forward + backward, {size}, {tokens} tokens"
    return Case("kernels", name, dtype, build, bytes=8 * tokens * width * dtype.itemsize)


def _divergence(device: str, dtype: torch.dtype, tokens: int, vocabulary: int) -> Case:
    def build() -> dict[str, Contender]:
        student = _randn(tokens, vocabulary, device=device, dtype=dtype).requires_grad_()
        teacher = _randn(tokens, vocabulary, device=device, dtype=dtype)
        dy = torch.ones((), device=device)

        def torchs() -> Tensor:
            p, q = (functional.log_softmax(t.float(), -1) for t in (teacher, student))
            return functional.kl_div(q, p, log_target=True, reduction="batchmean")

        ours = _contender(lambda: divergence(student, teacher), [student], dy)
        return {"mlfs": ours, "torch": _contender(torchs, [student], dy)}

    name = f"divergence, forward + backward, {tokens} tokens of {vocabulary}"
    return Case("kernels", name, dtype, build, bytes=5 * tokens * vocabulary * dtype.itemsize)


def _randn(*size: int, device: str, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(size, device=device).div_(size[-1] ** 0.5).to(dtype)
