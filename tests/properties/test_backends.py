"""Whole elastic models on the kernels: plain, compiled, under autocast, with checkpointing, and as a CUDA graph."""

import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch._library.custom_ops import CustomOpDef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mlfs import MLFSError, SearchSpace, Subnet, SuperTransformer
from mlfs.elastic.linear import ElasticLinear
from mlfs.models import follow
from mlfs.ops import backend
from mlfs.ops.backend import backend_of, use_backend, why_no_cpp
from tests.devices import on_each_device
from tests.supernets import elastic, perturb, subnets_of
from tests.tiny_models import inputs, logits_of, make

MODELS = [("bert", "ForSequenceClassification"), ("llama", "ForCausalLM"), ("gpt_bigcode-mqa", "ForCausalLM")]
some_models = pytest.mark.parametrize(("name", "suffix"), MODELS, ids=["bert", "llama", "gpt_bigcode"])
SUBNETS = ("uniform", "per layer, without layer 0")


@pytest.fixture(autouse=True)
def kernels_can_run() -> None:
    pytest.importorskip("triton")


def batch_on(device: str) -> dict[str, Any]:
    return {key: value.to(device) for key, value in inputs().items()} | {"use_cache": False}


def training(name: str, suffix: str, device: str = "cpu", dtype: torch.dtype = torch.float32) -> SuperTransformer:
    supernet = elastic(name, suffix).to(device, dtype)
    supernet.train_stage(1)
    return supernet


def shallow(name: str, suffix: str, device: str = "cpu") -> tuple[SuperTransformer, tuple[Subnet, Subnet]]:
    """One with subnets of a single layer, which compile in seconds, and two of these."""
    space = SearchSpace((48, 32, 16), (6, 4, 2), (40, 24), ((0, 1, 2, 3), (2,), (1,)))
    supernet = perturb(SuperTransformer(make(name, suffix), space, rank=4)).eval().to(device)
    supernet.train_stage(1)
    return supernet, (Subnet(32, 4, 24, (2,)), Subnet(16, 2, 40, (1,)))


def step(supernet: SuperTransformer, model: Callable[..., Any], batch: dict[str, Any]) -> dict[str, Tensor]:
    """Logits and gradients of a forward and a backward pass."""
    supernet.zero_grad()
    logits = logits_of(model(**batch))
    logits.float().square().mean().backward()
    gradients = {name: p.grad.clone() for name, p in supernet.own_parameters().items() if p.grad is not None}
    return {"logits": logits.detach(), **gradients}


def agree(found: dict[str, Tensor], right: dict[str, Tensor], tolerance: float) -> None:
    """Relative to the largest number of each; of gradients, to the largest among all."""
    assert found.keys() == right.keys() and len(right) > 8
    largest = max(t.abs().max().item() for name, t in right.items() if name != "logits")
    for name, exact in right.items():
        scale = exact.abs().max().item() if name == "logits" else largest
        error = (found[name].cpu().double() - exact.cpu().double()).abs().max().item()
        assert error <= tolerance * scale, f"{name}: {error} of {scale}"


@on_each_device
@some_models
def test_a_step_of_a_whole_model_equals_float64(device, name, suffix):
    supernet, exact = training(name, suffix, device), training(name, suffix, dtype=torch.float64)
    for key in SUBNETS:
        subnet = subnets_of(name)[key]
        with exact.activate(subnet):
            right = step(exact, exact, batch_on("cpu"))
        with supernet.activate(subnet), use_backend("triton"):
            agree(step(supernet, supernet, batch_on(device)), right, 1e-5)


@on_each_device
@some_models
def test_compiled_whole_on_the_kernels_each_subnet_equals_eager(device, name, suffix):
    supernet, (one, other) = shallow(name, suffix, device)
    torch._dynamo.reset()
    compiled = torch.compile(supernet.model, fullgraph=True, backend="inductor" if device == "cuda" else "aot_eager")
    batch = batch_on(device)
    with use_backend("triton"):
        for subnet in (one, other, one):
            with supernet.activate(subnet):
                agree(step(supernet, compiled, batch), step(supernet, supernet, batch), 1e-5)


@pytest.mark.soak
def test_compiled_by_inductor_on_the_reference_equals_eager():
    supernet, (subnet, _) = shallow("llama", "ForCausalLM")
    torch._dynamo.reset()
    compiled, batch = torch.compile(supernet.model, fullgraph=True), batch_on("cpu")
    with supernet.activate(subnet):
        agree(step(supernet, compiled, batch), step(supernet, supernet, batch), 1e-5)


@on_each_device
@some_models
def test_autocast_on_the_kernels(device, name, suffix):
    supernet, exact = training(name, suffix, device), training(name, suffix, dtype=torch.float64)
    subnet = subnets_of(name)["uniform"]
    with exact.activate(subnet):
        right = step(exact, exact, batch_on("cpu"))
    with supernet.activate(subnet), use_backend("triton"), torch.autocast(device, dtype=torch.bfloat16):
        found = step(supernet, supernet, batch_on(device))
    assert found["logits"].dtype == torch.bfloat16 and found.keys() == right.keys()
    assert {t.dtype for key, t in found.items() if key != "logits"} == {torch.float32}
    for key in right:
        assert (found[key].cpu().double() - right[key]).norm() < 0.06 * right[key].norm(), key


@on_each_device
@pytest.mark.parametrize("reentrant", [False, True])
@some_models
def test_gradient_checkpointing_on_the_kernels_gives_the_same_gradients(device, name, suffix, reentrant):
    results = []
    for checkpoints in (False, True):
        supernet, (subnet, _) = shallow(name, suffix, device)
        model = supernet.model
        if checkpoints:
            # transformers before 5.21 has only the older name
            enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
            enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
        for module in supernet.train().modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
            if hasattr(module, "attention_dropout"):
                module.attention_dropout = 0.0
        ran: list[int] = []
        inside = next(m for m in supernet.layers[subnet.layers[0]].modules() if isinstance(m, ElasticLinear))
        inside.register_forward_pre_hook(lambda *_, ran=ran: ran.append(1))
        with use_backend("triton"), supernet.activate(subnet):
            results.append((step(supernet, supernet, batch_on(device)), len(ran)))
    (right, once), (found, twice) = results
    assert (once, twice) == (1, 2)
    assert found.keys() == right.keys()
    for key in right:
        assert torch.equal(found[key], right[key]), key


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_forced_backend_is_taken(device, monkeypatch):
    x = torch.ones(2, 3, device=device)
    monkeypatch.setattr(backend, "_forced", None)
    # the default off a GPU
    assert backend_of(x) == ("cpp" if x.device.type == "cpu" and why_no_cpp() is None else "reference")
    for name in ("reference", "triton"):
        monkeypatch.setattr(backend, "_forced", name)
        assert backend_of(x) == name
        with use_backend("reference"):  # which comes first
            assert backend_of(x) == "reference"
    with pytest.raises(MLFSError, match=r"torch.float64 is not supported"):
        backend_of(x.double())


def test_the_environment_variable_names_the_backend():
    code = "import torch; from mlfs.ops.backend import backend_of; print(backend_of(torch.ones(2)))"
    for name, found in (("reference", "reference"), ("", backend_of(torch.ones(2))), ("cuda", "expected one of ref")):
        environment = os.environ | {"MLFS_BACKEND": name}
        out = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
        assert found in (out.stdout if name != "cuda" else out.stderr)


class HostTraffic(TorchDispatchMode):
    """Runs the operators' own code (not their fake versions) on `meta` tensors and lists what a CUDA graph forbids.

    That is what asks for a tensor's content, and what goes from the host to the device or back. `meta` stands for the
    device: it has no content, and is not the host. New tensors made of numbers pass no dispatcher, so `torch.tensor`
    is watched by itself.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.ran: Counter[str] = Counter()
        modules = (sys.modules[f"mlfs.ops.{name}"] for name in ("sliced_linear", "grouped_linear", "norm", "rotary"))
        defined = [d for module in modules for d in vars(module).values() if isinstance(d, CustomOpDef)]
        self.own = {definition._opoverload: definition._init_fn for definition in defined}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.ran[func._schema.name.partition("::")[2]] += 1
        if func in self.own:
            with self:
                return self.own[func](*args, **kwargs or {})
        depends = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape} & set(func.tags)
        if depends and func is not torch.ops.aten.index.Tensor:  # a mask as an index raises by itself
            self.found.append(str(func))
        out = func(*args, **kwargs or {})
        devices = {t.device.type for t in tree_leaves((args, kwargs, out)) if isinstance(t, Tensor) and t.dim()}
        if len(devices) > 1:
            self.found.append(f"{func} between {devices}")
        return out


class Made(TorchFunctionMode):
    """Lists the tensors made of Python's numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.tensor, torch.as_tensor, torch.from_numpy):
            self.found.append(f"{func.__name__}{args}")
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("sizes", ["one size", "rows of several sizes"])
@some_models
def test_no_step_on_the_kernels_waits_for_the_device_or_sends_to_it(name, suffix, sizes):
    """Of the second step on: the first may make tables, which are kept. transformers looks at the padding mask, but not
    while a graph is recorded."""
    from transformers import masking_utils
    from triton.runtime.interpreter import InterpretedFunction

    from mlfs.kernels import configs, grouped

    supernet = training(name, suffix)
    subnets = list(subnets_of(name).values())[-3:]
    supernet.model.to("meta")
    batch = batch_on("meta")
    launched: list[str] = []
    run = mock.patch.object(
        InterpretedFunction,
        "run",
        lambda kernel, *_, **__: launched.append(f"{kernel.fn.__module__.rpartition('.')[2]}.{kernel.__name__}"),
    )
    recording = mock.patch.object(masking_utils, "is_tracing", lambda *_: True)
    try:
        with run, recording, configs.assume("sm90"), use_backend("triton"):
            for attempt in ("first", "second"):
                launched.clear()
                active = supernet.activate(subnets[0]) if sizes == "one size" else supernet.activate_rows(subnets)
                with active, HostTraffic() as traffic, Made() as made:
                    logits_of(supernet(**batch)).square().mean().backward()
                assert traffic.found == [], attempt
                assert attempt == "first" or made.found == []
                assert bool(made.found) == (attempt == "first" and sizes != "one size")  # the tables
    finally:
        for remembered in (grouped._fields, grouped._token_tiles, grouped._tiles, follow._remembered_mask):
            remembered.cache_clear()
    linear = "sliced_linear" if sizes == "one size" else "grouped_sliced_linear"
    wanted = {linear, f"{linear}_backward", "add_norm", "add_norm_backward", *(["rotary"] if name == "llama" else [])}
    assert wanted <= traffic.ran.keys()
    products = ["product._forward", "product._backward", "reductions._thin", "reductions._reduce"]
    if sizes != "one size":
        products = ["grouped._forward", "grouped._backward", "grouped._thin", "grouped._reduce"]
    assert {*products, "reductions._finish", "norm._forward", "norm._backward"} <= set(launched)


def test_what_waits_for_the_device_or_sends_to_it_is_seen():
    x = torch.ones(3, device="meta")
    with HostTraffic() as traffic, Made() as made:
        x + torch.ones(3).to("meta")
        torch.tensor([1.0], device="meta")
        for look in (x.sum().item, x.nonzero, lambda: x[x > 0]):
            with pytest.raises((RuntimeError, NotImplementedError)):
                look()
    seen = ["aten._to_copy.default", "aten._local_scalar_dense.default", "aten.nonzero.default"]
    assert [line.split()[0] for line in traffic.found] == seen
    assert made.found == ["tensor([1.0],)"]


@pytest.mark.gpu
@pytest.mark.parametrize("sizes", ["one size", "rows of several sizes"])
@some_models
def test_a_recorded_step_replays_with_the_same_numbers(name, suffix, sizes):
    """Forward and backward pass of a whole model, replayed on other inputs than it was recorded with. Eager attention
    takes another kernel, as transformers looks at masks then: equal but for rounding."""
    supernet, batch = training(name, suffix, "cuda"), batch_on("cuda")
    del batch["attention_mask"]
    subnets, ids = list(subnets_of(name).values())[-3:], batch["input_ids"]
    contents = [ids.clone(), ids.flip(0)]
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    active = supernet.activate(subnets[0]) if sizes == "one size" else supernet.activate_rows(subnets)
    with active:
        right = [step(supernet, supernet, batch | {"input_ids": content}) for content in contents]
        parameters = supernet.own_parameters()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                step(supernet, supernet, batch)
            supernet.zero_grad()
        torch.cuda.current_stream().wait_stream(stream)
        with torch.cuda.graph(graph):
            logits = logits_of(supernet(**batch))
            logits.float().square().mean().backward()
    for content, expected in list(zip(contents, right, strict=True))[::-1]:
        ids.copy_(content)
        replays = []
        for _ in range(2):
            graph.replay()
            gradients = {key: p.grad.clone() for key, p in parameters.items() if p.grad is not None}
            replays.append({"logits": logits.detach().clone(), **gradients})
        first, second = replays
        agree(first, expected, 1e-5)
        assert all(torch.equal(first[key], second[key]) for key in first)
