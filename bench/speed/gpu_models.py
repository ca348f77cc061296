"""Cases of `bench.speed.gpu`: training steps and decoded tokens of whole models, at real sizes with random weights."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
)

from bench.speed.gpu_timing import Case, Contender
from mlfs import SearchSpace, Subnet, SuperTransformer
from mlfs.elastic.linear import ElasticLinear
from mlfs.ops.backend import use_backend

RANK = 8


@dataclass(frozen=True)
class Workload:
    """Describes a model, what is sliced out of it, and the batch (rows, tokens) of a training step."""

    name: str
    make: Callable[[PretrainedConfig], PreTrainedModel]
    config: PretrainedConfig
    full: Subnet
    half: Subnet
    batch: tuple[int, int]
    context: int = 128  # tokens in the cache when one is decoded; 0: it does not decode

    @property
    def space(self) -> SearchSpace:
        """The space of the two subnets."""
        pairs = {name: (getattr(self.full, name), getattr(self.half, name)) for name in ("hidden", "heads", "ffn")}
        layers = (self.full.layers,) if self.full.layers == self.half.layers else (self.full.layers, self.half.layers)
        return SearchSpace(**pairs, layers=layers)


def workloads(tiny: bool) -> list[Workload]:
    """Lists the models, with random weights; `tiny` ones only show whether the code runs."""
    no_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}  # contenders draw other masks
    if tiny:
        sizes = {"vocab_size": 50, "hidden_size": 16, "num_attention_heads": 4, "intermediate_size": 16,
                 "num_hidden_layers": 1}  # fmt: skip
        full, half = Subnet(16, 4, 16, (0,)), Subnet(8, 2, 8, (0,))
        bert = BertConfig(**sizes, max_position_embeddings=16, **no_dropout)
        llama = LlamaConfig(**sizes, num_key_value_heads=2)
        return [
            Workload("tiny BERT", BertForSequenceClassification, bert, full, half, (1, 3), 0),
            Workload("tiny Llama", LlamaForCausalLM, llama, full, half, (1, 3), 4),
        ]
    smol = LlamaConfig(
        vocab_size=49152, hidden_size=576, num_attention_heads=9, num_key_value_heads=3, intermediate_size=1536,
        num_hidden_layers=30, tie_word_embeddings=True, max_position_embeddings=2048,
    )  # fmt: skip
    layer = LlamaConfig(
        vocab_size=256, hidden_size=4096, num_attention_heads=32, intermediate_size=11008, num_hidden_layers=1
    )
    twelve, thirty = tuple(range(12)), tuple(range(30))
    return [
        Workload(
            "BERT-base", BertForSequenceClassification, BertConfig(**no_dropout), Subnet(768, 12, 3072, twelve),
            Subnet(384, 6, 1536, twelve[::2]), (32, 128), 0,
        ),
        Workload(
            "SmolLM2-135M", LlamaForCausalLM, smol, Subnet(576, 9, 1536, thirty), Subnet(384, 6, 768, thirty[::2]),
            (8, 512), 512,
        ),
        Workload(
            "a Llama-7B layer", LlamaForCausalLM, layer, Subnet(4096, 32, 11008, (0,)), Subnet(2048, 16, 5504, (0,)),
            (1, 2048), 512,
        ),
    ]  # fmt: skip


def training_cases(device: str, dtypes: list[torch.dtype], tiny: bool, quick: bool) -> Iterator[Case]:
    """Yields a step of one subnet (full, half), eager and recorded; and a step over four subnets."""
    for dtype in dtypes:
        for load in workloads(tiny):
            rows, tokens = load.batch
            for share, graph in _variants(quick):
                yield Case(
                    "training", f"step, {load.name}, {share}, {rows} x {tokens} tokens", dtype,
                    partial(_steps, load, getattr(load, share), device, dtype), graph,
                    flops=lambda found: _flops(found["no adapter"].run),
                )  # fmt: skip
            if not (tiny and load.context):
                name = f"one step over 4 subnets, {load.name}, {rows} x {tokens} tokens each"
                yield Case("training", name, dtype, partial(_joint_steps, load, device, dtype), graph=False)


def decoding_cases(device: str, dtypes: list[torch.dtype], tiny: bool, quick: bool) -> Iterator[Case]:
    """Yields one decoded token after a context, eager; and one token alone, recorded."""
    for dtype in dtypes:
        for load in (load for load in workloads(tiny) if load.context):
            for share, graph in _variants(quick):
                subnet, context = getattr(load, share), 0 if graph else load.context
                after = f", {context} in the cache" if context else ""
                yield Case(
                    "decoding", f"token, {load.name}, {share}{after}", dtype,
                    partial(_tokens, load, subnet, device, dtype, context), graph,
                    bytes=_weight_bytes(load, subnet, dtype),
                )  # fmt: skip


def _variants(quick: bool) -> list[tuple[str, bool]]:
    """Lists (share of the model, whether runs are recorded)."""
    return [(share, graph) for share in (("half",) if quick else ("full", "half")) for graph in (False, True)]


@dataclass
class Models:
    """Holds a super-transformer and its contenders: PEFT on the extracted model, and that model alone."""

    supernet: SuperTransformer
    peft: Any
    plain: PreTrainedModel
    slices: list[Tensor]  # the parts of the large weights that the subnet reads

    @classmethod
    def make(cls, supernet: SuperTransformer, subnet: Subnet) -> "Models":
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(r=RANK, lora_alpha=2 * RANK, lora_dropout=0.0, target_modules="all-linear")
        peft = get_peft_model(supernet.extract(subnet), config)
        plain = supernet.extract(subnet).requires_grad_(False)
        sizes, slices = supernet.layer_sizes(subnet), []
        for module in supernet.elastic():
            if isinstance(module, ElasticLinear) and module.rank and all(module.read_sizes(sizes)):
                n, m = module.read_sizes(sizes)
                slices.append(module.own_weight.detach()[:m, :n])
        return cls(supernet, peft, plain, slices)

    def copy(self) -> None:
        """Copies the slice into smaller weights, which is what this costs."""
        for part in self.slices:
            part.clone(memory_format=torch.contiguous_format)


def _supernet(load: Workload, device: str, dtype: torch.dtype) -> SuperTransformer:
    with torch.device(device):
        model = load.make(load.config)
    model.config.use_cache = False
    supernet = SuperTransformer(model.to(dtype).eval(), load.space, rank=RANK, alpha=2.0 * RANK)
    supernet.train_stage(0)
    for module in supernet.elastic():
        if isinstance(module, ElasticLinear):
            for b in module.lora_B:
                b.data.normal_(std=0.02)
    return supernet


def _batch(load: Workload, device: str) -> dict[str, Tensor]:
    ids = torch.randint(load.config.vocab_size, load.batch, device=device)
    labels = torch.randint(2, load.batch[:1], device=device) if not load.context else ids
    return {"input_ids": ids, "labels": labels}


def _autocast(device: str, dtype: torch.dtype) -> Any:
    """Adapters stay in fp32; a recorded graph must hold no cast that was remembered from outside of it."""
    return nullcontext() if dtype == torch.float32 else torch.autocast(device, dtype, cache_enabled=False)


def _step(
    model: Any, batch: dict[str, Tensor], around: Callable[[], Any], before: Callable[[], None] | None = None
) -> Contender:
    """Forward, backward and AdamW on what trains (nothing, for a frozen model whose input wants a gradient)."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    device = batch["input_ids"].device.type
    dtype = next(model.parameters()).dtype
    fused = {"fused": True, "capturable": True} if device == "cuda" else {}
    optimizer = torch.optim.AdamW(parameters, lr=1e-7, **fused) if parameters else None

    def run() -> None:
        if before is not None:
            before()
        if optimizer is not None:
            optimizer.zero_grad()
        with around():
            with _autocast(device, dtype):
                loss = model(**batch).loss
            loss.backward()
        if optimizer is not None:
            optimizer.step()

    def look() -> Tensor:
        with torch.no_grad(), around(), _autocast(device, dtype):
            return model(**batch).logits.float()

    return Contender(run, look)


def _around(supernet: SuperTransformer, subnet: Subnet, backend: str) -> Callable[[], Any]:
    @contextmanager
    def inside() -> Iterator[None]:
        with use_backend(backend), supernet.activate(subnet):
            yield

    return inside


def _steps(load: Workload, subnet: Subnet, device: str, dtype: torch.dtype) -> dict[str, Contender]:
    models, batch = Models.make(_supernet(load, device, dtype), subnet), _batch(load, device)
    models.plain.enable_input_require_grads()  # so that the backward pass goes through all layers
    ours = models.supernet
    return {
        "mlfs": _step(ours, batch, _around(ours, subnet, "triton")),
        "cuBLAS + adapters": _step(ours, batch, _around(ours, subnet, "reference")),
        "PEFT": _step(models.peft, batch, nullcontext),
        "copied slice": _step(models.peft, batch, nullcontext, models.copy),
        "no adapter": _step(models.plain, batch, nullcontext),
    }


def _joint_steps(load: Workload, device: str, dtype: torch.dtype) -> dict[str, Contender]:
    """The same batch at four sizes, then AdamW: all in one pass, one after the other, and four models of PEFT's."""
    supernet, batch = _supernet(load, device, dtype), _batch(load, device)
    full, half = load.full, load.half
    between = [Subnet(half.hidden, heads, half.ffn, full.layers) for heads in (full.heads, half.heads)]
    subnets = [full, *between, half]
    trained = [p for p in supernet.parameters() if p.requires_grad]
    rows = load.batch[0]
    four = {"input_ids": torch.cat([batch["input_ids"]] * 4)}
    twins = [_step(Models.make(supernet, subnet).peft, batch, nullcontext) for subnet in subnets]
    fused = {"fused": True} if device == "cuda" else {}
    optimizer = torch.optim.AdamW(trained, lr=1e-7, **fused)

    def together(backend: str) -> Contender:
        def run() -> None:
            optimizer.zero_grad()
            with use_backend(backend), supernet.activate_rows([s for s in subnets for _ in range(rows)]):
                with _autocast(device, dtype):
                    loss = supernet(**four).logits.float().square().mean()
                loss.backward()
            optimizer.step()

        return Contender(run)

    def in_turn() -> None:
        optimizer.zero_grad()
        for subnet in subnets:
            with _around(supernet, subnet, "triton")():
                with _autocast(device, dtype):
                    loss = supernet(input_ids=batch["input_ids"]).logits.float().square().mean()
                loss.backward()
        optimizer.step()

    def peft() -> None:
        for twin in twins:
            twin.run()

    return {"mlfs": together("triton"), "one by one": Contender(in_turn), "cuBLAS + adapters": together("reference"),
            "PEFT": Contender(peft)}  # fmt: skip


def _tokens(load: Workload, subnet: Subnet, device: str, dtype: torch.dtype, context: int) -> dict[str, Contender]:
    """One token after `context` others, which are in the cache; alone if there are none."""
    models = Models.make(_supernet(load, device, dtype), subnet)
    models.peft.to(dtype)  # its adapters, which it would otherwise compute in fp32
    ids = torch.randint(load.config.vocab_size, (1, context + 1), device=device)

    def token(model: Any, around: Callable[[], Any], before: Callable[[], None] | None = None) -> Contender:
        cache = DynamicCache(config=load.config) if context else None

        def run() -> Tensor:
            with torch.no_grad(), around():
                if before is not None:
                    before()
                if cache is None:
                    return model(input_ids=ids, use_cache=False).logits
                logits = model(input_ids=ids[:, -1:], past_key_values=cache, use_cache=True).logits
                cache.crop(-1)  # for the next run
                return logits

        if cache is not None:
            with torch.no_grad(), around():
                model(input_ids=ids[:, :-1], past_key_values=cache, use_cache=True)
        return Contender(run, run)

    ours = models.supernet
    return {
        "mlfs": token(ours, _around(ours, subnet, "triton")),
        "cuBLAS + adapters": token(ours, _around(ours, subnet, "reference")),
        "PEFT": token(models.peft, nullcontext),
        "copied slice": token(models.peft, nullcontext, models.copy),
        "no adapter": token(models.plain, nullcontext),
    }


def _weight_bytes(load: Workload, subnet: Subnet, dtype: torch.dtype) -> float:
    """Of the projections a token reads."""
    config = load.config
    head = config.hidden_size // config.num_attention_heads
    kv = subnet.heads * config.num_key_value_heads // config.num_attention_heads
    each = subnet.hidden * head * (2 * subnet.heads + 2 * kv) + 3 * subnet.hidden * subnet.ffn
    return float((len(subnet.layers) * each + subnet.hidden * config.vocab_size) * dtype.itemsize)


def _flops(run: Callable[[], Any]) -> float:
    counter = FlopCounterMode(display=False)
    with counter, sdpa_kernel(SDPBackend.MATH):  # PyTorch 2.11 cannot count fused, grouped-query attention
        run()
    return float(counter.get_total_flops())
