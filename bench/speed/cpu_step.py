"""What training and inference cost on a CPU, against PEFT, plain transformers and the matrix products alone.

    python -m bench.speed.cpu_step               everything, a quarter of an hour on two cores (or: make bench-cpu)
    python -m bench.speed.cpu_step --only encoderone part: encoder, decoder, memory, inference, decoding, scaling
    python -m bench.speed.cpu_step --table       prints the recorded results

Training: one iteration of `MLFSTrainer` over four sizes (maxnet teaches the others) against one step of each size with
PEFT (LoRA of rank 8 on every linear, distilled from the full model, whose forward pass is part of the step); the same
batch, dropout rates, losses and optimizer. The floor is what the linear layers' own matrix products (forward, and the
gradient of their input) take at the rate of torch.mm in the same run, for the tokens that are no padding. All variants
take turns in one process; figures are medians, with quartiles.
"""

import argparse
import functools
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from tqdm import tqdm
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
    set_seed,
)

from bench.quality.palette import cpu_name
from mlfs import MLFSArguments, MLFSTrainer, SearchSpace, Subnet, SuperTransformer, without_padding
from mlfs.elastic.linear import ElasticLinear
from mlfs.files import write_json
from mlfs.models.pretrained import MINILM, SMOLLM2, find_model
from mlfs.ops.backend import cpp, why_no_cpp
from mlfs.report.table import table
from mlfs.space.search_space import evenly_spaced
from mlfs.training.task import CausalLanguageModeling, Classification

RESULTS = Path(__file__).parents[1] / "results" / "cpu_step.json"
ALPHA, RATE = 0.9, 1e-3
ENCODER = SearchSpace(hidden=(384, 288, 192), heads=(12, 9, 6), ffn=(1536, 1152, 768),
                      layers=(tuple(range(6)), (0, 2, 4)))  # fmt: skip
ENCODER_SIZES = (
    Subnet(384, 12, 1536, ENCODER.layers[0]),
    Subnet(288, 9, 1152, ENCODER.layers[0]),
    Subnet(192, 6, 768, ENCODER.layers[0]),
    Subnet(192, 6, 768, ENCODER.layers[1]),
)
DECODER = SearchSpace(hidden=(576, 384), heads=(9, 6), ffn=(1536, 1024),
                      layers=(tuple(range(30)), evenly_spaced(30, 20)))  # fmt: skip
DECODER_SIZES = tuple(
    Subnet(hidden, heads, ffn, layers)
    for layers in DECODER.layers
    for hidden, heads, ffn in zip(DECODER.hidden, DECODER.heads, DECODER.ffn, strict=True)
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", choices=list(PARTS), help="default: all")
    parser.add_argument("--repeats", type=int, default=11, help="of each variant (a third of it for the decoder)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--table", action="store_true", help="print the recorded results and stop")
    parser.add_argument("--one", choices=["ours", "peft", "nothing"], help=argparse.SUPPRESS)  # of the memory part
    given = parser.parse_args()
    if given.one:
        print(peak_of(given.one))
        return
    result: dict[str, Any] = json.loads(given.output.read_text()) if given.output.exists() else {}
    if not given.table:
        for part in given.only or PARTS:
            set_seed(given.seed)
            result[part] = PARTS[part](given)
            result |= {
                "machine": f"{cpu_name()}, {torch.get_num_threads()} threads of {os.cpu_count()}",
                "torch": torch.__version__,
                "extension": why_no_cpp() or cpp().instructions(),
            }
            write_json(given.output, result)
    print(show(result))


# ---- training -------------------------------------------------------------------------------------------------------


def encoder(given: argparse.Namespace) -> dict[str, Any]:
    return train("encoder", ENCODER_SIZES, encoder_batch(), given.repeats)


def decoder(given: argparse.Namespace) -> dict[str, Any]:
    return train("decoder", DECODER_SIZES, decoder_batch(), max(given.repeats // 3, 3))


def encoder_batch(rows: int = 32, longest: int = 64) -> dict[str, Tensor]:
    """Sentences of 6 to `longest` tokens, padded to it."""
    lengths = torch.linspace(6, longest, rows).long()
    mask = (torch.arange(longest) < lengths[:, None]).long()
    return {
        "input_ids": torch.randint(1000, 30000, (rows, longest)) * mask,
        "attention_mask": mask,
        "labels": torch.randint(0, 2, (rows,)),
    }


def decoder_batch() -> dict[str, Tensor]:
    ids = torch.randint(1000, 40000, (4, 256))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


def load(kind: str) -> PreTrainedModel:
    auto = AutoModelForSequenceClassification if kind == "encoder" else AutoModelForCausalLM
    return auto.from_pretrained(find_model(MINILM if kind == "encoder" else SMOLLM2), dtype=torch.float32)


def supernet_of(kind: str, space: SearchSpace | None = None) -> SuperTransformer:
    return SuperTransformer(load(kind), space or (ENCODER if kind == "encoder" else DECODER))


def our_iteration(
    supernet: SuperTransformer, sizes: tuple[Subnet, ...], batch: dict[str, Tensor]
) -> Callable[[], None]:
    """One iteration of stage 2 over `sizes`, with its optimizer step."""
    args = MLFSArguments(
        output_dir=tempfile.mkdtemp(), report_to=[], stages_to_train=[2], dropout_stages=[2], distill_alpha=ALPHA,
        distill_beta=[0.0], subnets_per_step=len(sizes), learning_rate=RATE, use_cpu=True,
    )  # fmt: skip
    trainer = MLFSTrainer(supernet, args, train_dataset=[0])  # type: ignore[arg-type]
    trainer.stage = 2
    supernet.train_stage(2)
    supernet.merge_stages(2)
    trainer.draw_subnets = lambda: list(sizes)  # type: ignore[method-assign]
    trainer.current_gradient_accumulation_steps = 1
    optimizer = trainer.create_optimizer()

    def run() -> None:
        trainer.training_step(supernet.model, dict(batch))
        optimizer.step()
        optimizer.zero_grad()

    return run


def peft_step(
    model: PreTrainedModel, teacher: PreTrainedModel, batch: dict[str, Tensor], causal: bool
) -> Callable[[], None]:
    """One step of a size alone, distilled from the full model, with its optimizer step."""
    lora = LoraConfig(
        task_type="CAUSAL_LM" if causal else "SEQ_CLS", r=8, lora_alpha=16, lora_dropout=0.0,
        target_modules="all-linear", modules_to_save=None if causal else ["classifier"],
    )  # fmt: skip
    student = get_peft_model(model, lora).train()
    optimizer = torch.optim.AdamW([p for p in student.parameters() if p.requires_grad], lr=RATE, fused=True)
    task = CausalLanguageModeling() if causal else Classification()

    def run() -> None:
        with torch.no_grad():
            goal = teacher(**{k: v for k, v in batch.items() if k != "labels"})
        out = student(**batch)
        kl = task.divergence(out, goal, batch)
        ((1 - ALPHA) * out.loss + ALPHA * kl).backward()
        optimizer.step()
        optimizer.zero_grad()

    return run


def train(kind: str, sizes: tuple[Subnet, ...], batch: dict[str, Tensor], repeats: int) -> dict[str, Any]:
    supernet = supernet_of(kind)
    teacher = load(kind).eval().requires_grad_(False)
    variants: dict[str, Callable[[], Any]] = {"mlfs": our_iteration(supernet, sizes, batch)}
    for size in sizes:
        twin = supernet_of(kind).extract(size)
        variants[f"PEFT {size}"] = peft_step(twin, teacher, batch, causal=kind == "decoder")
    variants["sgemm"] = sgemm
    if why_no_cpp() is None:
        variants["extension"] = own_product
    times = alternate(variants, repeats, kind)
    rate, own_rate = (SGEMM_FLOPS / median(times[name]) if name in times else 0.0 for name in ("sgemm", "extension"))
    tokens = int(batch["attention_mask"].sum())
    floor = sum(products(supernet, size) for size in sizes) * tokens / rate
    peft = [sum(row) for row in zip(*(times[name] for name in variants if name.startswith("PEFT")), strict=True)]
    mine = times["mlfs"]
    return {
        "sizes": {name.removeprefix("PEFT "): spread(values) for name, values in times.items() if "PEFT" in name},
        "mlfs": spread(mine),
        "PEFT": spread(peft),
        "floor": floor,
        "mlfs / PEFT": spread([a / b for a, b in zip(mine, peft, strict=True)]),
        "mlfs / floor": median(mine) / floor,
        "sgemm GFLOP/s": rate / 1e9,
        "extension GFLOP/s": own_rate / 1e9,
        "mlfs / own floor": median(mine) / floor * own_rate / rate,
        "tokens": tokens,
    }


def products(supernet: SuperTransformer, size: Subnet) -> int:
    """Operations a token of the linear layers inside `size`: forward, and the gradient of their input. The head counts
    where it is one of the vocabulary's; projections of the first layer need no gradient of their input."""
    sizes, total = supernet.layer_sizes(size), 0
    first = f"{supernet.layers_name}.{size.layers[0]}."
    for name, module in supernet.model.named_modules():
        if isinstance(module, ElasticLinear) and not module.owned and "pooler" not in name:
            n, m = module.read_sizes(sizes)
            frozen_input = name.startswith(first) and name.endswith(
                ("query", "key", "value", "q_proj", "k_proj", "v_proj")
            )
            total += 2 * n * m * (1 if frozen_input else 2) * (m > 0)
    return total


SGEMM_SIZE = 1024
SGEMM_FLOPS = 2 * SGEMM_SIZE**3


@functools.cache
def square(name: str) -> Tensor:
    return torch.randn(SGEMM_SIZE, SGEMM_SIZE)


def sgemm() -> None:
    """PyTorch's product."""
    torch.mm(square("a"), square("b"), out=square("out"))


def own_product() -> None:
    """The same by the extension."""
    cpp().product(square("a"), square("b").t(), None, square("out"))


# ---- memory ---------------------------------------------------------------------------------------------------------


def memory(given: argparse.Namespace) -> dict[str, Any]:
    """Peak memory of an iteration beyond the loaded model, each in a process of its own."""
    command = [sys.executable, "-m", "bench.speed.cpu_step", "--one"]
    peaks = {
        what: int(subprocess.run([*command, what], capture_output=True, text=True, check=True).stdout.split()[-1])
        for what in ("nothing", "ours", "peft")
    }
    ours, peft = (peaks[what] - peaks["nothing"] for what in ("ours", "peft"))
    return {"base MB": peaks["nothing"] / 1e3, "mlfs MB": ours / 1e3, "PEFT MB": peft / 1e3,
            "mlfs / PEFT": peaks["ours"] / peaks["peft"]}  # fmt: skip


def peak_of(what: str) -> int:
    """Peak resident kilobytes of this process after two iterations of `what`."""
    set_seed(0)
    batch = encoder_batch()
    if what == "ours":
        run = our_iteration(supernet_of("encoder"), ENCODER_SIZES, batch)
    elif what == "peft":
        teacher = load("encoder").eval().requires_grad_(False)
        run = peft_step(load("encoder"), teacher, batch, causal=False)
    else:
        load("encoder")
        return peak()
    run(), run()
    return peak()


def peak() -> int:
    status = Path("/proc/self/status")
    if status.exists():  # getrusage counts what the process was forked from, too
        return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


# ---- inference ------------------------------------------------------------------------------------------------------


def inference(given: argparse.Namespace) -> dict[str, Any]:
    """Latency of each size, stages unmerged, against the extracted plain model; and of switching between calls."""
    found: dict[str, Any] = {}
    supernet = with_stages(supernet_of("encoder")).eval()
    padded = {k: v for k, v in encoder_batch().items() if k != "labels"}
    batches = {"1": one_sentence(), "32": padded, "32, without padding": padded}
    for size in ENCODER_SIZES:
        small = supernet.extract(size).eval()
        for rows, batch in batches.items():
            packs = "without" in rows

            def ours(batch: Any = batch, size: Any = size, packs: bool = packs) -> None:
                with torch.inference_mode(), supernet.activate(size), without_padding(packs):
                    supernet(**batch)

            def plain(batch: Any = batch, small: Any = small) -> None:
                with torch.inference_mode():
                    small(**batch)

            times = alternate({"ours": ours, "plain": plain}, 3 * given.repeats, f"{size}, batch {rows}")
            ratios = [a / b for a, b in zip(times["ours"], times["plain"], strict=True)]
            found[f"{size}, batch {rows}"] = {
                "mlfs": spread(times["ours"]), "extracted": spread(times["plain"]), "ratio": spread(ratios),
            }  # fmt: skip
    found["switching"] = switching(supernet, batches["1"], given.repeats)
    return found


def one_sentence(tokens: int = 16) -> dict[str, Tensor]:
    ids = torch.randint(1000, 30000, (1, tokens))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def switching(supernet: SuperTransformer, batch: dict[str, Tensor], repeats: int) -> float:
    """Seconds that a call takes longer because the one before ran another size."""
    a, b = ENCODER_SIZES[1:3]

    def calls(order: tuple[Subnet, ...]) -> Callable[[], None]:
        def run() -> None:
            for size in order:
                with torch.inference_mode(), supernet.activate(size):
                    supernet(**batch)

        return run

    times = alternate({"mixed": calls((a, b) * 4), "same": calls((a,) * 4 + (b,) * 4)}, 4 * repeats, "switching")
    return (median(times["mixed"]) - median(times["same"])) / 6


def with_stages(supernet: SuperTransformer) -> SuperTransformer:
    """All three stages live, as after training."""
    for stage in range(supernet.stages):
        supernet.train_stage(stage)
    for module in supernet.elastic():
        if isinstance(module, ElasticLinear):
            for b in module.lora_B:
                b.data.normal_(std=0.01)
    supernet.train_stage(None)
    return supernet


def decoding(given: argparse.Namespace) -> dict[str, Any]:
    """Tokens a second of SmolLM2, batch 1, and the share of the memory's bandwidth (a measured copy) that they take."""
    found: dict[str, Any] = {}
    supernet = with_stages(supernet_of("decoder")).eval()
    prompt, tokens = torch.randint(1000, 40000, (1, 16)), 24
    source = torch.randn(64 << 20)
    goal = torch.empty_like(source)
    options = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False, "pad_token_id": 0}
    for size in DECODER_SIZES:
        small = supernet.extract(size).eval()

        def ours(size: Any = size) -> None:
            with torch.inference_mode(), supernet.activate(size):
                supernet.generate(prompt, **options)

        def plain(small: Any = small) -> None:
            with torch.inference_mode():
                small.generate(prompt, **options)

        variants = {"ours": ours, "plain": plain, "copy": lambda: goal.copy_(source)}
        times = alternate(variants, max(given.repeats // 2, 3), f"decoding {size}")
        ratios = [b / a for a, b in zip(times["ours"], times["plain"], strict=True)]
        bandwidth = 2 * source.nbytes / median(times["copy"])
        read = 4 * supernet.count_parameters(size)  # every weight, once a token
        found[str(size)] = {
            "mlfs tokens/s": tokens / median(times["ours"]),
            "extracted tokens/s": tokens / median(times["plain"]),
            "ratio": spread(ratios),
            "share of bandwidth": read * tokens / median(times["ours"]) / bandwidth,
        }
    return found


# ---- scaling --------------------------------------------------------------------------------------------------------


def scaling(given: argparse.Namespace) -> list[dict[str, Any]]:
    """Iteration time and floor against the number of subnets, tokens and hidden size."""
    supernet, rows = supernet_of("encoder"), []
    base = encoder_batch()
    cases: list[tuple[str, tuple[Subnet, ...], dict[str, Tensor]]] = [
        (f"{k} subnets", (ENCODER_SIZES * 2)[:k], base) for k in (1, 2, 4, 8)
    ]
    cases += [(f"{rows} sentences", ENCODER_SIZES, encoder_batch(rows)) for rows in (8, 16, 64)]
    cases += [(f"hidden {size.hidden}", (size,), base) for size in ENCODER_SIZES[:3]]
    variants: dict[str, Callable[[], Any]] = {
        name: our_iteration(supernet, sizes, batch) for name, sizes, batch in cases
    }
    times = alternate({**variants, "sgemm": sgemm}, max(given.repeats // 2, 3), "scaling")
    rate = SGEMM_FLOPS / median(times["sgemm"])
    for name, sizes, batch in cases:
        floor = sum(products(supernet, size) for size in sizes) * int(batch["attention_mask"].sum()) / rate
        took = median(times[name])
        rows.append({"case": name, "seconds": took, "floor": floor, "seconds / floor": took / floor})
    return rows


# ---- measuring ------------------------------------------------------------------------------------------------------

PARTS: dict[str, Callable[[argparse.Namespace], Any]] = {
    "encoder": encoder, "decoder": decoder, "memory": memory, "inference": inference, "decoding": decoding,
    "scaling": scaling,
}  # fmt: skip


def alternate(variants: dict[str, Callable[[], Any]], repeats: int, what: str) -> dict[str, list[float]]:
    """Seconds of each variant, which take turns; the first turn warms up and does not count."""
    times: dict[str, list[float]] = {name: [] for name in variants}
    for i in tqdm(range(repeats + 1), desc=what, leave=False):
        for name, run in variants.items():
            start = time.perf_counter()
            run()
            if i:
                times[name].append(time.perf_counter() - start)
    return times


def spread(values: list[float]) -> list[float]:
    """[median, lower quartile, upper quartile]."""
    low, _, high = quantiles(values, n=4)
    return [median(values), low, high]


def show(result: dict[str, Any]) -> str:
    lines = [f"{result['machine']}, torch {result['torch']}, extension: {result['extension']}"]

    def ms(values: list[float]) -> str:
        return f"{values[0] * 1e3:.1f} ms ({values[1] * 1e3:.1f} to {values[2] * 1e3:.1f})"

    def ratio(values: list[float]) -> str:
        return f"{values[0]:.3f} ({values[1]:.3f} to {values[2]:.3f})"

    for kind in ("encoder", "decoder"):
        if kind in result:
            r = result[kind]
            rows = [{"what": f"PEFT, {size}", "time": ms(values)} for size, values in r["sizes"].items()]
            rows += [{"what": "PEFT, sum", "time": ms(r["PEFT"])}, {"what": "mlfs, all", "time": ms(r["mlfs"])}]
            rows += [
                {
                    "what": f"floor, {r['tokens']} tokens at {r['sgemm GFLOP/s']:.0f} GFLOP/s",
                    "time": ms([r["floor"]] * 3),
                }
            ]
            rows += [{"what": "mlfs / PEFT", "time": ratio(r["mlfs / PEFT"])}]
            rows += [{"what": "mlfs / floor", "time": f"{r['mlfs / floor']:.2f}"}]
            if own := r["extension GFLOP/s"]:
                what = f"mlfs / floor at the extension's {own:.0f} GFLOP/s"
                rows += [{"what": what, "time": f"{r['mlfs / own floor']:.2f}"}]
            lines += ["", f"Training step, {kind}", table(rows)]
    if "memory" in result:
        lines += ["", "Peak memory beyond the loaded model (ratio: of whole processes)", table([result["memory"]])]
    if "inference" in result:
        r = dict(result["inference"])
        pause = r.pop("switching")
        rows = [
            {"size, batch": name, "mlfs": ms(v["mlfs"]), "extracted": ms(v["extracted"]), "ratio": ratio(v["ratio"])}
            for name, v in r.items()
        ]
        lines += ["", "Inference, stages unmerged", table(rows), f"switching sizes: {pause * 1e3:.3f} ms a call"]
    if "decoding" in result:
        rows = [{"size": k, **v, "ratio": ratio(v["ratio"])} for k, v in result["decoding"].items()]
        lines += ["", "Decoding", table(rows)]
    if "scaling" in result:
        lines += ["", "Scaling", table(result["scaling"])]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
