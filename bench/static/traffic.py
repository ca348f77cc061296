"""What a computation reads from memory, writes to it and multiplies, launch by launch, without a device.

with record() as launches:
    model(ids).logits.sum().backward()   # tensors on the meta device: shapes only
memory_traffic(launches, cache=25 << 20)

Everything PyTorch would launch on a GPU is seen on its way to the device: its own kernels as they are called, by the
autograd engine too, and mlfs's operators as the launches of `mlfs.kernels`, whose launchers run. A launch touches each
of its tensors once: what it reads again itself is left to the caches, as with every kernel.
"""

import inspect
import sys
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib import import_module
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from mlfs.kernels import configs, decode, joint, norm, product, reductions, rotary

# by name: `mlfs.ops` has functions of these names
OPERATORS = [
    import_module(f"mlfs.ops.{name}") for name in ("feed_forward", "joint_linear", "norm", "rotary", "sliced_linear")
]
Sizes = Mapping[Hashable, int]  # bytes, by tensor


@dataclass(frozen=True)
class Launch:
    """One kernel: the bytes of each tensor that it reads and writes, and the operations of its products."""

    name: str
    reads: Sizes
    writes: Sizes
    flops: int = 0
    fp32: bool = False  # whether its products are of fp32 numbers, which the matrix units do not take exactly

    @property
    def bytes(self) -> int:
        return sum(self.reads.values()) + sum(self.writes.values())


def memory_traffic(launches: Iterable[Launch], cache: int) -> list[int]:
    """Bytes that each launch moves to and from memory, if what was touched last is still in a cache of that size.

    A tensor is read from the cache if it and all that was touched since fit. All that is written goes to memory.
    """
    recent: OrderedDict[Hashable, int] = OrderedDict()  # the last touched at the end
    moved = []
    for launch in launches:
        held, room = set(), cache
        for key, size in reversed(recent.items()):
            room -= size
            if room < 0:
                break
            held.add(key)
        moved.append(launch.bytes - sum(size for key, size in launch.reads.items() if key in held))
        for key, size in (*launch.reads.items(), *launch.writes.items()):
            recent[key] = size
            recent.move_to_end(key)
        while len(recent) > 1 and sum(recent.values()) - next(iter(recent.values())) > cache:
            recent.popitem(last=False)
    return moved


# ---- mlfs's kernels: what each touches, of the arguments that it is launched with ------------------------------------

Arguments = Mapping[str, Any]
Elements = dict[str, int]  # numbers read or written, by argument


def _ranks(a: Arguments) -> int:
    """Of all stages; a kernel that has none is given the rank 1."""
    return a["STAGES"] * a["RANK"]


def _stages(a: Arguments, size: int, name: str = "stage") -> Elements:
    return {f"{name}{s}": a["RANK"] * size for s in range(a["STAGES"])}


def _if(**options: tuple[bool, int]) -> Elements:
    """Those that are wanted, of (whether it is, numbers)."""
    return {name: size for name, (wanted, size) in options.items() if wanted}


def _thin(a: Arguments, grid: tuple[int, ...]) -> tuple[Elements, Elements, int]:
    tokens, depth, ranks = a["tokens"], a["depth"], _ranks(a)
    return {"x": tokens * depth, **_stages(a, depth)}, {"h": tokens * ranks}, 2 * tokens * depth * ranks


def _forward(a: Arguments, grid: tuple[int, ...]) -> tuple[Elements, Elements, int]:
    tokens, depth, columns, ranks = a["tokens"], a["depth"], _spans(a), _ranks(a)
    out = tokens * columns
    reads = {"x": tokens * depth, "w": depth * columns, **_stages(a, columns)}
    reads |= _if(
        h=(a["STAGES"] > 0, tokens * ranks),
        bias=(a["HAS_BIAS"], columns),
        operand=(a["ACTIVATION"] == "silu_mul", out),
        residual=(a["HAS_RESIDUAL"], out),
    )
    return reads, _if(pre=(a["KEEP_PRE"], out)) | {"y": out}, 2 * out * (depth + ranks)


def _backward(a: Arguments, grid: tuple[int, ...]) -> tuple[Elements, Elements, int]:
    tokens, depth, columns, ranks = a["tokens"], _spans(a), a["columns"], _ranks(a)
    out = tokens * columns
    reads = {"dy": tokens * depth, "w": depth * columns, **_stages(a, columns)}
    reads |= _if(g=(a["STAGES"] > 0, tokens * ranks), residual=(a.get("HAS_RESIDUAL", False), out))
    return reads, {"dx": out}, 2 * out * (depth + ranks)


def _backward_through_activation(a: Arguments, grid: tuple[int, ...]) -> tuple[Elements, Elements, int]:
    reads, writes, flops = _backward(a, grid)
    out, gated = writes.pop("dx"), a["ACTIVATION"] == "silu_mul"
    reads |= _if(operand=(gated, out), pre=(True, out))
    writes = {"d_pre": out} | _if(d_operand=(gated, out))
    if a["RANKS"]:
        writes["partial"] = a["partial"].shape[0] * a["RANKS"] * a["columns"]
    return reads, writes, flops + 2 * out * a["RANKS"]


def _joint_forward(a: Arguments, grid: tuple[int, ...]) -> tuple[Elements, Elements, int]:
    tokens, depth, ranks, layers = a["tokens"], a["depth"], _ranks(a), range(a["LAYERS"])
    columns = {i: a[f"columns{i}"] for i in layers}
    reads = {"x": tokens * depth} | {f"w{i}": size * depth for i, size in columns.items()}
    for i, size in columns.items():
        reads |= _stages(a, size, f"stage{i}")
    reads |= _if(h=(ranks > 0, tokens * ranks * len(layers)))
    reads |= {f"bias{i}": size for i, size in columns.items()} if a["HAS_BIAS"] else {}
    written = layers if a["KEEP"] or not a["GATED"] else (0,)
    writes = _if(z=(a["GATED"] and a["KEEP"], tokens * columns[0]))
    writes |= {f"y{i}": tokens * columns[i] for i in reversed(written)}
    return reads, writes, 2 * tokens * sum(columns.values()) * (depth + ranks)


def _joint_backward(a: Arguments, grid: tuple[int, ...]) -> tuple[Elements, Elements, int]:
    tokens, columns, ranks, layers = a["tokens"], a["columns"], _ranks(a), range(a["LAYERS"])
    out, depths = tokens * columns, {i: a[f"depth{i}"] for i in layers}
    reads = {f"dy{i}": tokens * depth for i, depth in depths.items()}
    reads |= {f"w{i}": depth * columns for i, depth in depths.items()} | _stages(a, columns)
    reads |= _if(g=(ranks > 0, tokens * ranks), residual=(a["HAS_RESIDUAL"], out))
    return reads, {"dx": out}, 2 * out * (sum(depths.values()) + ranks)


def _reduce(a: Arguments, grid: tuple[int, ...]) -> tuple[Elements, Elements, int]:
    tokens, ranks, columns = a["tokens"], a["ranks"], a["columns"]
    partial = grid[1] * ranks * columns
    return {"g": tokens * ranks, "x": tokens * columns}, {"partial": partial}, 2 * tokens * ranks * columns


def _thin_reduce(a: Arguments, grid: tuple[int, ...]) -> tuple[Elements, Elements, int]:
    tokens, columns, trained, ranks = a["tokens"], a["columns"], a["ranks"], _ranks(a)
    reads = {"dy": tokens * columns, "h": tokens * trained, **_stages(a, columns)}
    writes = {"partial_g": grid[1] * ranks * tokens, "partial": grid[0] * trained * columns}
    return reads, writes, 2 * tokens * columns * (ranks + trained)


def _finish(a: Arguments, grid: tuple[int, ...]) -> tuple[Elements, Elements, int]:
    size = a["rank"] * _spans(a)
    return {"partial": a["parts"] * size}, {"out": size}, 0


def _spans(a: Arguments) -> int:
    """The length of all spans."""
    return sum(a[f"length{i}"] for i in range(a["SPANS"]))


def _activation_backward(a: Arguments, grid: tuple[int, ...]) -> tuple[Elements, Elements, int]:
    size, gated = a["rows"] * a["columns"], a["ACTIVATION"] == "silu_mul"
    more = {"operand": size} if gated else {}
    return {"dy": size, "pre": size, **more}, {"dz": size, **({"d_operand": size} if gated else {})}, 0


def _norm_forward(a: Arguments, grid: tuple[int, ...]) -> tuple[Elements, Elements, int]:
    n, size = a["n"], a["rows"] * a["n"]
    reads = {"x": size} | _if(
        residual=(a["HAS_RESIDUAL"], size),
        weight=(a["HAS_WEIGHT"], n),
        bias=(a["HAS_BIAS"], n),
        seed=(a["P"] > 0, 1),
    )
    return reads, {"y": size} | _if(s=(a["KEEP"], size)), 0


def _norm_backward(a: Arguments, grid: tuple[int, ...]) -> tuple[Elements, Elements, int]:
    n, size = a["n"], a["rows"] * a["n"]
    reads = {"dy": size, "s": size}
    reads |= _if(ds=(a["HAS_DS"], size), weight=(a["HAS_WEIGHT"], n), seed=(a["DROPS"], 1))
    sums = _if(dw=(a["TRAINS"], grid[0] * n), db=(a["TRAINS"], grid[0] * n))
    return reads, {"dx": size} | _if(d_residual=(a["DROPS"], size)) | sums, 0


def _rotary(a: Arguments, grid: tuple[int, ...]) -> tuple[Elements, Elements, int]:
    places, dim = grid[0], 2 * a["half"]
    sizes = {name: places * a[f"{name}_heads"] * dim for name in ("q", "k")}
    reads = sizes | {name: dim * (places if a[f"{name}_b"] else a["tokens"]) for name in ("cos", "sin")}
    return reads, {f"{name}_out": size for name, size in sizes.items()}, 0


def _decode_parts(a: Arguments, grid: tuple[int, ...]) -> tuple[Elements, Elements, int]:
    tokens, depth, columns, ranks = a["tokens"], a["depth"], a["columns"], _ranks(a)
    reads = {"x": tokens * depth, "w": depth * columns}
    for s in range(a["STAGES"]):
        reads |= {f"a{s}": a["RANK"] * depth, f"b{s}": a["RANK"] * columns}
    flops = 2 * tokens * (depth * columns + grid[0] * depth * ranks + grid[1] * columns * ranks)
    return reads, {"partial": grid[1] * tokens * columns}, flops


def _decode_sum(a: Arguments, grid: tuple[int, ...]) -> tuple[Elements, Elements, int]:
    columns, out = a["columns"], a["tokens"] * a["columns"]
    reads = {"partial": a["parts"] * out} | _if(
        bias=(a["HAS_BIAS"], columns),
        residual=(a["HAS_RESIDUAL"], out),
        operand=(a["ACTIVATION"] == "silu_mul", out),
    )
    return reads, {"y": out}, 0


KERNELS: dict[tuple[Any, str], Callable[[Arguments, tuple[int, ...]], tuple[Elements, Elements, int]]] = {
    (reductions, "_thin"): _thin,
    (reductions, "_reduce"): _reduce,
    (reductions, "_thin_reduce"): _thin_reduce,
    (reductions, "_finish"): _finish,
    (product, "_forward"): _forward,
    (product, "_backward"): _backward,
    (product, "_backward_through_activation"): _backward_through_activation,
    (product, "activation_backward_kernel"): _activation_backward,
    (joint, "_forward"): _joint_forward,
    (joint, "_backward"): _joint_backward,
    (norm, "_forward"): _norm_forward,
    (norm, "_backward"): _norm_backward,
    (rotary, "_rotary"): _rotary,
    (decode, "_parts"): _decode_parts,
    (decode, "_sum"): _decode_sum,
}


@contextmanager
def kernel_launches(arch: str, seen: Callable[[Launch, Any, tuple[int, ...], Arguments], None]) -> Iterator[None]:
    """Calls `seen` with each launch of mlfs's kernels inside the block instead of launching it, and with the kernel,
    grid and arguments; launchers choose tiles as for `arch`."""
    with ExitStack() as stack:
        stack.enter_context(configs.assume(arch))
        stack.enter_context(mock.patch.object(configs, "may_tune", lambda: False))
        for (module, name), touches in KERNELS.items():
            stack.enter_context(mock.patch.object(module, name, _Stub(module, name, touches, seen)))
        yield


class _Stub:
    """Stands where a kernel was."""

    def __init__(self, module: Any, name: str, touches: Any, seen: Any) -> None:
        self.kernel, self.touches, self.seen = getattr(module, name), touches, seen
        self.name = f"{module.__name__.rpartition('.')[2]}.{name.lstrip('_').removesuffix('_kernel')}"
        self.parameters = list(inspect.signature(self.kernel.fn).parameters)

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*args: Any, **kwargs: Any) -> None:
            arguments = dict(zip(self.parameters, args, strict=False)) | kwargs
            *touched, flops = self.touches(arguments, grid)
            reads, writes = (
                {key_of(arguments[name], size): size * arguments[name].itemsize for name, size in numbers.items()}
                for numbers in touched
            )
            fp32 = arguments.get("PRECISION") == "ieee" and arguments[self.parameters[0]].itemsize == 4
            self.seen(Launch(self.name, reads, writes, flops, fp32), self.kernel, grid, arguments)

        return launch


def key_of(tensor: Tensor, numbers: int) -> Hashable:
    """The same for tensors that are the same place in memory."""
    return tensor.untyped_storage()._cdata, tensor.storage_offset(), numbers


# ---- PyTorch's kernels -----------------------------------------------------------------------------------------------


@contextmanager
def record(arch: str = "sm90") -> Iterator[list[Launch]]:
    """The launches inside the block, in order, of computations on the meta device."""
    recorder = _Recorder()
    attention = mock.patch.object(torch.nn.functional, "scaled_dot_product_attention", recorder.attention)
    launches = kernel_launches(arch, lambda launch, *_: recorder.launches.append(launch))
    with _on_kernels(), attention, launches, recorder:
        yield recorder.launches


@contextmanager
def _on_kernels() -> Iterator[None]:
    """Operators take the kernels whatever their tensors are on: on the meta device they would take plain PyTorch."""
    with ExitStack() as stack:
        for name, module in list(sys.modules.items()):
            if name.startswith("mlfs.") and "backend_of" in vars(module):
                stack.enter_context(mock.patch.object(module, "backend_of", lambda *_: "triton"))
        yield


_BODIES = {
    definition._opoverload: definition._init_fn
    for module in OPERATORS
    for definition in vars(module).values()
    if isinstance(definition, torch._library.custom_ops.CustomOpDef)
}
# No kernel: memory is taken, or seen in another shape.
_FREE = {"empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided", "_unsafe_view", "detach", "alias",
         "lift_fresh", "_reshape_alias"}  # fmt: skip
_FILLS = {"fill_", "zero_", "copy_", "zeros_like", "ones_like", "full_like", "new_zeros", "new_ones", "new_full"}


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.launches: list[Launch] = []
        self._alive: list[Any] = []  # an address belongs to one tensor

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _BODIES:
            with self:
                return _BODIES[func](*args, **kwargs)
        out = func(*args, **kwargs)
        name = func._overloadpacket.__name__
        given, made = _tensors((args, kwargs)), _tensors(out)
        self._alive += [t.untyped_storage() for t in (*given, *made)]
        views = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
        if views or name in _FREE or not made:
            return out
        reads = {key_of(t, count(t)): count(t) * t.itemsize for t in given}
        writes = {key_of(t, count(t)): count(t) * t.itemsize for t in made}
        if name == "embedding":  # of the table, only the rows that are asked for
            reads = {key_of(args[1], args[1].numel()): args[1].nbytes, key_of(args[0], out.numel()): out.nbytes}
        elif name in _FILLS:
            reads = {key: size for key, size in reads.items() if name == "copy_" and key not in writes}
        formula = flop_registry.get(func._overloadpacket)
        flops = formula(*args, **kwargs, out_val=out) if formula else 0
        self.launches.append(Launch(f"torch.{name}", reads, writes, flops, bool(flops) and out.itemsize == 4))
        return out

    def attention(self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None,
                  dropout_p: float = 0.0, is_causal: bool = False, scale: float | None = None,
                  enable_gqa: bool = False) -> Tensor:  # fmt: skip
        assert attn_mask is None and dropout_p == 0.0
        return _Attention.apply(query, key, value, is_causal, self)


class _Attention(torch.autograd.Function):
    """FlashAttention-2 (arXiv 2307.08691) as PyTorch's sources launch it: q (B, H, S, D), k and v (B, G, L, D)."""

    @staticmethod
    def forward(ctx, q, k, v, causal, recorder):
        o = q.new_empty(q.shape[0], q.shape[2], q.shape[1], v.shape[3]).transpose(1, 2)
        lse = q.new_empty(q.shape[:3], dtype=torch.float32)
        ctx.save_for_backward(q, k, v, o, lse)
        ctx.flops, ctx.recorder = attention_flops(q, k, causal), recorder
        recorder.launches.append(flash_attention(_touched(q=q, k=k, v=v, o=o, lse=lse), ctx.flops))
        return o

    @staticmethod
    def backward(ctx, do):
        q, k, v, o, lse = ctx.saved_tensors
        delta, sums = torch.empty_like(lse), torch.empty_like(q, dtype=torch.float32)
        dq, dk, dv = (torch.empty_like(t) for t in (q, k, v))
        tensors = {"q": q, "k": k, "v": v, "o": o, "lse": lse, "do": do, "delta": delta, "sums": sums}
        tensors |= {"dq": dq, "dk": dk, "dv": dv}
        if k.shape[1] < q.shape[1]:
            wide = [t.new_empty(t.shape[0], q.shape[1], *t.shape[2:]) for t in (k, v)]
            tensors |= dict(zip(("wide_k", "wide_v"), wide, strict=True))
        ctx.recorder.launches += flash_attention_backward(_touched(**tensors), ctx.flops)
        return dq, dk, dv, None, None


Touched = Mapping[str, tuple[Hashable, int]]  # of each tensor, which one it is and its bytes


def flash_attention(t: Touched, flops: int) -> Launch:
    return Launch("attention.forward", dict(t[x] for x in ("q", "k", "v")), dict(t[x] for x in ("o", "lse")), flops)


def flash_attention_backward(t: Touched, flops: int) -> list[Launch]:
    """flops: of the forward pass. Keys and values of fewer heads get gradients of all heads first: wide_k, wide_v."""
    keys = ("wide_k", "wide_v") if "wide_k" in t else ("dk", "dv")
    steps = [
        (("o", "do"), ("delta", "sums"), 0),
        # dq is summed in place by programs that each have some of the keys
        (("q", "k", "v", "do", "lse", "delta", "sums"), ("sums", *keys), flops * 5 // 2),
        (("sums",), ("dq",), 0),
    ]
    steps += [((wide,), (d,), 0) for wide, d in (("wide_k", "dk"), ("wide_v", "dv")) if "wide_k" in t]
    return [
        Launch("attention.backward", dict(t[x] for x in reads), dict(t[x] for x in writes), operations)
        for reads, writes, operations in steps
    ]


def attention_flops(q: Tensor, k: Tensor, causal: bool) -> int:
    """Of q · kᵀ and p · v; half of them where a token sees only those before it."""
    return 4 * q.numel() * k.shape[2] // (2 if causal else 1)


def _touched(**tensors: Tensor) -> Touched:
    return {name: (key_of(t, count(t)), count(t) * t.itemsize) for name, t in tensors.items()}


def count(t: Tensor) -> int:
    """Numbers of t in memory; along an expanded axis they are the same ones."""
    total = 1
    for size, stride in zip(t.shape, t.stride(), strict=True):
        total *= size if stride or not size else 1
    return total


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
