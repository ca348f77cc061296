"""Memory traffic and operations of a subnet's pass, against PEFT's and against a lower bound. Counted, not timed.

    python -m bench.static.roofline                          all models, 1.5 minutes; to bench/results/roofline.json
    python -m bench.static.roofline --model SmolLM2-135M     one model
    python -m bench.static.roofline --launches BERT-base     every launch of a training pass of the full model, in order

Counted are (a) the pass of a subnet in one training step, forward and backward, bf16 base, fp32 adapters of rank 8, no
dropout, without the head and its loss, and (b) one decoded token after a context, adapters of three stages. The paths:

  mlfs    what `SuperTransformer` launches: the models run on the meta device (shapes, no numbers), PyTorch's kernels
          are seen as they are called, mlfs's as their launchers launch them (bench/static/traffic.py).
  PEFT    the same for the subnet as a model of its own, with LoRA from PEFT (rank 8 to train, 24 to decode).
  bound   what no program does without whose products have the loop of a plain product, over operands as they are in
          memory (`LowerBoundOfScheme` in bench/static/lower_bound.py); to decode it is the floor.
  floor   what no program does without that keeps what passes between matrix products, attention and norms in memory
          (`LowerBound` there): adapters and activations cost nothing beside the products, nor does what PyTorch's
          attention needs for itself.

mlfs, PEFT and bound take attention from PyTorch (FlashAttention-2). A launch touches each of its tensors once. "all" is
the traffic of all launches. "memory" is what of it leaves the L2 cache: a tensor is read from there if it and all that
was touched since its last use fit in half of it. The same rule holds for all paths. "time" is a PREDICTION from an H100
SXM's published rates: for each launch the longer of its operations and its memory traffic, all added up; what it takes
to launch is left out. The target is at most 1.1 of the bound for "memory".
"""

import argparse
import re
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AttentionInterface,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    DynamicCache,
    GPTBigCodeConfig,
    LlamaConfig,
    PreTrainedModel,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from bench.environment import environment
from bench.static.lower_bound import LowerBound, LowerBoundOfScheme
from bench.static.traffic import Launch, memory_traffic, record
from mlfs import SearchSpace, Subnet, SuperTransformer
from mlfs.files import write_json
from mlfs.models.configuration import dimensions
from mlfs.models.families.table import family_of
from mlfs.report.table import table
from mlfs.space.search_space import evenly_spaced

RESULTS = Path(__file__).parents[1] / "results" / "roofline.json"
RANK, STAGES, CONTEXT = 8, 3, 512
TARGET = 1.1
WHAT = {"all": "bytes", "memory": "memory", "operations": "operations", "time": "seconds"}  # columns, and their values
PATHS = ("floor", "mlfs", "PEFT")  # beside the bound


@dataclass(frozen=True)
class Device:
    """Published rates: operations a second in bf16 and (outside the matrix units) fp32, bytes a second, bytes of L2."""

    name: str
    bf16: float
    fp32: float
    bandwidth: float
    cache: int

    def seconds(self, launch: Launch, moved: int) -> float:
        return max(launch.flops / (self.fp32 if launch.fp32 else self.bf16), moved / self.bandwidth)


H100 = Device("H100 SXM", 989e12, 67e12, 3.35e12, 50 << 20)


@dataclass(frozen=True)
class Workload:
    """A model's configuration and the batch that it trains on; `decodes` if it also makes single tokens."""

    config: Any
    batch: int
    length: int
    decodes: bool = True


MODELS = {
    "BERT-base": Workload(
        BertConfig(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0), 32, 128, decodes=False
    ),
    "SantaCoder": Workload(
        GPTBigCodeConfig(
            n_embd=2048, n_layer=24, n_head=16, n_inner=8192, vocab_size=49280, n_positions=2048, multi_query=True,
            activation_function="gelu_pytorch_tanh", attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0,
        ), 2, 2048,
    ),
    "CodeLlama-7B": Workload(
        LlamaConfig(
            hidden_size=4096, num_hidden_layers=32, num_attention_heads=32, intermediate_size=11008, vocab_size=32016,
            max_position_embeddings=16384,
        ), 1, 4096,
    ),
    "SmolLM2-135M": Workload(
        LlamaConfig(
            hidden_size=576, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3, intermediate_size=1536,
            vocab_size=49152, max_position_embeddings=8192, tie_word_embeddings=True,
        ), 2, 2048,
    ),
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", choices=list(MODELS), help="default: all")
    parser.add_argument("--stage", type=int, default=0, help="which stage trains (default 0); earlier ones are merged")
    parser.add_argument("--no-merge", action="store_true", help="earlier stages are read beside the base instead")
    parser.add_argument("--launches", choices=list(MODELS), help="print every launch of the full size, and stop")
    parser.add_argument("--output", type=Path, default=RESULTS)
    given = parser.parse_args()
    if given.launches:
        for launch in paths(MODELS[given.launches], "full", "training", given.stage, not given.no_merge)["mlfs"]:
            read, written = (sum(sizes.values()) / 1e6 for sizes in (launch.reads, launch.writes))
            print(f"{launch.name:34}{read:10.3f} MB read {written:10.3f} MB written {launch.flops / 1e9:10.3f} Gflop")
        return
    rows = []
    for name in given.model or MODELS:
        for row in measure(name, MODELS[name], given.stage, not given.no_merge):
            rows.append(row)
            print(f"{name} {row['subnet']}, {row['pass']}", file=sys.stderr)
    print(show(rows))
    if given.output != RESULTS or not (given.model or given.stage):
        options = {"rank": RANK, "stages": STAGES, "context": CONTEXT, "target": TARGET}
        write_json(given.output, {"environment": environment(), "device": asdict(H100), **options, "rows": rows})


def measure(name: str, work: Workload, stage: int = 0, merge: bool = True) -> Iterator[dict[str, Any]]:
    """A row for each size of the model's palette and each pass."""
    for size, subnet in palette_of(work)[1].items():
        for kind in ("training", "1 token") if work.decodes else ("training",):
            found = paths(work, size, kind, stage, merge)
            start = {"model": name, "size": size, "subnet": str(subnet), "pass": kind}
            yield start | {path: totals(launches) for path, launches in found.items()}


def paths(work: Workload, size: str, kind: str, stage: int = 0, merge: bool = True) -> dict[str, list[Launch]]:
    """The launches of each path."""
    supernet, sizes = palette_of(work)
    subnet = sizes[size]
    if kind == "training":
        kinds = {"floor": LowerBound, "bound": LowerBoundOfScheme}
        bounds = {name: kind(supernet, subnet, work.batch, work.length, RANK) for name, kind in kinds.items()}
        return {
            **{name: [*bound.forward(), *bound.backward()] for name, bound in bounds.items()},
            "mlfs": train(supernet, subnet, work, stage, merge),
            "PEFT": train(twin(supernet, subnet, RANK), subnet, work),
        }
    bound = LowerBound(supernet, subnet, 1, 1, RANK * STAGES, past=CONTEXT - 1)
    return {
        **{name: [*bound.forward(), bound.head()] for name in ("floor", "bound")},
        "mlfs": decode(supernet, subnet),
        "PEFT": decode(twin(supernet, subnet, RANK * STAGES), subnet),
    }


def totals(launches: list[Launch], device: Device = H100) -> dict[str, Any]:
    moved = memory_traffic(launches, device.cache // 2)
    kernels: Counter[str] = Counter()
    for launch, size in zip(launches, moved, strict=True):
        kernels[launch.name] += size
    return {
        "launches": len(launches),
        "bytes": sum(launch.bytes for launch in launches),
        "memory": sum(moved),
        "operations": sum(launch.flops for launch in launches),
        "seconds": sum(map(device.seconds, launches, moved)),
        "memory by kernel": dict(kernels.most_common()),
    }


def palette_of(work: Workload) -> tuple[SuperTransformer, dict[str, Subnet]]:
    """The model on the meta device, elastic; and four sizes: full, two thirds as wide, as deep, and both."""
    full = dimensions(work.config, family_of(work.config))
    heads = round(full.heads // full.group * 2 / 3) * full.group
    hidden, ffn = heads * full.head_dim, round(full.ffn * 2 / 3 / 64) * 64
    every, some = evenly_spaced(full.layers, full.layers), evenly_spaced(full.layers, round(full.layers * 2 / 3))
    space = SearchSpace((full.hidden, hidden), (full.heads, heads), (full.ffn, ffn), (every, some))
    kind = AutoModelForCausalLM if work.decodes else AutoModelForSequenceClassification
    with torch.device("meta"):
        model = kind.from_config(work.config, dtype=torch.bfloat16, attn_implementation=attention_without_masks())
    sizes = {
        "full": space.max,
        "2/3 width": Subnet(hidden, heads, ffn, every),
        "2/3 depth": Subnet(full.hidden, full.heads, full.ffn, some),
        "both": space.min,
    }
    return SuperTransformer(model, space, RANK, STAGES), sizes


# ---- what runs -------------------------------------------------------------------------------------------------------

Model = SuperTransformer | PreTrainedModel


def twin(supernet: SuperTransformer, subnet: Subnet, rank: int) -> PreTrainedModel:
    """The subnet as a plain model, with LoRA on all linears of its layers."""
    model, name = supernet.extract(subnet), supernet.layers_name
    linears = [f"{name}.{n}" for n, m in model.get_submodule(name).named_modules() if isinstance(m, torch.nn.Linear)]
    return get_peft_model(model, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=linears)).get_base_model()


def train(model: Model, subnet: Subnet, work: Workload, stage: int = 0, merge: bool = True) -> list[Launch]:
    """Forward and backward pass of all but the head and its loss."""
    if isinstance(model, SuperTransformer):
        model.merge_stages(0)
        model.train_stage(stage)
        model.merge_stages(stage if merge else 0)
    plain = plain_of(model).train()
    ids = torch.zeros(work.batch, work.length, dtype=torch.long, device="meta")
    with activated(model, subnet), record() as launches:
        hidden = plain.base_model(ids, use_cache=False).last_hidden_state
        hidden.backward(torch.empty_like(hidden))
    plain.zero_grad()
    return launches


@torch.no_grad()
def decode(model: Model, subnet: Subnet) -> list[Launch]:
    """One token after CONTEXT - 1 others, logits included; all stages are in use."""
    if isinstance(model, SuperTransformer):
        model.train_stage(STAGES - 1)
    plain, cache = plain_of(model).eval(), DynamicCache()
    ids = torch.zeros(1, CONTEXT, dtype=torch.long, device="meta")
    with activated(model, subnet):
        with record():
            plain.base_model(ids[:, 1:], past_key_values=cache, use_cache=True)
        with record() as launches:
            hidden = plain.base_model(ids[:, :1], past_key_values=cache, use_cache=True).last_hidden_state
            plain.get_output_embeddings()(hidden)
    return launches


def plain_of(model: Model) -> PreTrainedModel:
    return model.model if isinstance(model, SuperTransformer) else model


def activated(model: Model, subnet: Subnet) -> AbstractContextManager[Any]:
    return model.activate(subnet) if isinstance(model, SuperTransformer) else nullcontext()


def attention_without_masks() -> str:
    """The name of PyTorch's attention, for which transformers makes no mask: it would have to read numbers."""
    AttentionInterface.register("counted", sdpa_attention_forward)
    return "counted"


# ---- report ----------------------------------------------------------------------------------------------------------


def show(rows: list[dict[str, Any]]) -> str:
    """The bound, and floor and both paths as multiples of it; then where the traffic of the full sizes is."""
    lines = [
        "bound (in units); floor, mlfs and PEFT as multiples of it: traffic of all launches (GB) and to memory (GB),",
        f"operations (Tflop), predicted time on one {H100.name} (ms); number of launches of mlfs and PEFT",
        "",
        table([_line(row) for row in rows]),
        "",
        "traffic to memory by kernel (GB), training, full size; rest: additions, rotary embeddings, casts",
        "",
        table([line for row in rows if (row["size"], row["pass"]) == ("full", "training") for line in _kernels(row)]),
        "",
    ]
    for kind in ("training", "1 token"):
        some = [row for row in rows if row["pass"] == kind]
        lines += [_summary(kind, what, some) for what in WHAT.values() if some]
    return "\n".join(lines)


def _summary(kind: str, what: str, rows: list[dict[str, Any]]) -> str:
    ratios, floors = ([row["mlfs"][what] / row[least][what] for row in rows] for least in ("bound", "floor"))
    within = sum(ratio <= TARGET for ratio in ratios)
    found = (
        f"{min(ratios):.2f} to {max(ratios):.2f} of the bound (at most {TARGET} for {within} of {len(ratios)} sizes)"
    )
    return f"{kind}, {what}: {found}, {min(floors):.2f} to {max(floors):.2f} of the floor"


def _line(row: dict[str, Any]) -> dict[str, str]:
    line = {"model": row["model"], "hidden/heads/ffn/layers": row["subnet"], "pass": row["pass"]}
    units = {"all": 1e9, "memory": 1e9, "operations": 1e12, "time": 1e-3}
    for name, what in WHAT.items():
        bound = row["bound"][what]
        line[name] = " ".join([f"{bound / units[name]:.4g}", *(f"{row[p][what] / bound:.2f}x" for p in PATHS)])
    return line | {"launches": f"{row['mlfs']['launches']} {row['PEFT']['launches']}"}


def _kernels(row: dict[str, Any]) -> Iterator[dict[str, str]]:
    for path in ("floor", "bound", "mlfs", "PEFT"):
        sums: Counter[str] = Counter()
        for name, size in row[path]["memory by kernel"].items():
            sums[_kind(name)] += size
        yield {"model": row["model"], "path": path} | {kind: f"{sums[kind] / 1e9:.2f}" for kind in KINDS}


KINDS = ("products", "thin products", "adapter gradients", "activations", "norms", "attention", "rest")


def _kind(name: str) -> str:
    module, _, kernel = name.partition(".")
    if kernel in ("reduce", "thin_reduce", "finish") or name.endswith(" dA") or re.match("thin .* backward", name):
        return "adapter gradients"
    if module in ("joint", "decode") or kernel in ("mm", "addmm") or re.match("(qkv|out|up|down)", name):
        return "products"
    if module == "product":
        return "activations" if kernel == "activation_backward" else "products"
    if "norm" in name:
        return "norms"
    if module.startswith("attention"):
        return "attention"
    if kernel.startswith(("gelu", "silu")):
        return "activations"
    return "thin products" if kernel == "thin" or name.startswith("thin") else "rest"


if __name__ == "__main__":
    main()
