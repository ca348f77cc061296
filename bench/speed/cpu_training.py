"""Training parts of `bench.speed.cpu_step`: time of a step, its peak memory, and how both grow."""

import subprocess
import sys
import tempfile
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import PreTrainedModel, set_seed

from bench.memory import peak_memory
from bench.speed.cpu_models import (
    DECODER_SUBNETS,
    ENCODER_SUBNETS,
    decoder_batch,
    encoder_batch,
    load,
    supernet_of,
)
from bench.speed.cpu_timing import SQUARE_FLOPS, alternate, extension_product, ratios, spread, torch_product
from mlfs import MLFSArguments, MLFSTrainer, Subnet, SuperTransformer
from mlfs.elastic.linear import ElasticLinear
from mlfs.ops.backend import why_no_cpp
from mlfs.training.task import CausalLanguageModeling, Classification

ALPHA, RATE = 0.9, 1e-3  # share of the KL divergence, learning rate: the same on both sides


def encoder(repeats: int) -> dict[str, Any]:
    """Times training steps of the encoder over four sizes."""
    return _train("encoder", ENCODER_SUBNETS, encoder_batch(), repeats)


def decoder(repeats: int) -> dict[str, Any]:
    """Times training steps of the decoder over four sizes."""
    return _train("decoder", DECODER_SUBNETS, decoder_batch(), max(repeats // 3, 3))


def memory(repeats: int) -> dict[str, Any]:
    """Measures peak memory of a step beyond the loaded model, each variant in a process of its own; runs once."""
    command = [sys.executable, "-m", "bench.speed.cpu_step", "--one"]
    peaks = {}
    for variant in ("nothing", "mlfs", "peft"):
        done = subprocess.run([*command, variant], capture_output=True, text=True, check=True)
        peaks[variant] = int(done.stdout.split()[-1])
    return {
        "base MB": peaks["nothing"] / 1e3,
        "mlfs MB": (peaks["mlfs"] - peaks["nothing"]) / 1e3,
        "PEFT MB": (peaks["peft"] - peaks["nothing"]) / 1e3,
        "mlfs / PEFT": peaks["mlfs"] / peaks["peft"],
    }


def scaling(repeats: int) -> list[dict[str, Any]]:
    """Times a step, and computes its floor, against the number of subnets, of tokens, and hidden size."""
    supernet, batch = supernet_of("encoder"), encoder_batch()
    cases: dict[str, tuple[tuple[Subnet, ...], dict[str, Tensor]]] = {}
    for count in (1, 2, 4, 8):
        cases[f"{count} subnets"] = (ENCODER_SUBNETS * 2)[:count], batch
    for rows in (8, 16, 64):
        cases[f"{rows} sentences"] = ENCODER_SUBNETS, encoder_batch(rows)
    for subnet in ENCODER_SUBNETS[:3]:
        cases[f"hidden {subnet.hidden}"] = (subnet,), batch
    variants = {name: mlfs_step(supernet, subnets, inputs) for name, (subnets, inputs) in cases.items()}
    times = alternate({**variants, "product": torch_product}, max(repeats // 2, 3), "scaling")
    rate = SQUARE_FLOPS / median(times["product"])
    rows_of_table = []
    for name, (subnets, inputs) in cases.items():
        floor = _linear_flops(supernet, subnets, inputs) / rate
        took = median(times[name])
        rows_of_table.append({"case": name, "seconds": took, "floor": floor, "seconds / floor": took / floor})
    return rows_of_table


def peak_of(variant: str) -> int:
    """Returns the peak resident kilobytes of this process after two steps of "mlfs" or "peft", or of "nothing"."""
    set_seed(0)
    batch = encoder_batch()
    if variant == "nothing":
        load("encoder")
        return peak_memory() // 1024
    if variant == "mlfs":
        step = mlfs_step(supernet_of("encoder"), ENCODER_SUBNETS, batch)
    else:
        teacher = load("encoder").eval().requires_grad_(False)
        step = peft_step(load("encoder"), teacher, batch, causal=False)
    step()
    step()
    return peak_memory() // 1024


def mlfs_step(supernet: SuperTransformer, subnets: tuple[Subnet, ...], batch: dict[str, Tensor]) -> Callable[[], None]:
    """Makes a function that takes one step of stage 2 over `subnets`, the optimizer's included."""
    args = MLFSArguments(
        output_dir=tempfile.mkdtemp(),
        report_to=[],
        stages_to_train=[2],
        dropout_stages=[2],
        distill_alpha=ALPHA,
        distill_beta=[0.0],
        subnets_per_step=len(subnets),
        learning_rate=RATE,
        use_cpu=True,
    )
    trainer = MLFSTrainer(supernet, args, train_dataset=[0])  # type: ignore[arg-type]
    trainer.stage = 2
    supernet.train_stage(2)
    supernet.merge_stages(2)
    trainer.draw_subnets = lambda: list(subnets)  # type: ignore[method-assign]
    trainer.current_gradient_accumulation_steps = 1
    optimizer = trainer.create_optimizer()

    def step() -> None:
        trainer.training_step(supernet.model, dict(batch))
        optimizer.step()
        optimizer.zero_grad()

    return step


def peft_step(
    model: PreTrainedModel, teacher: PreTrainedModel, batch: dict[str, Tensor], causal: bool
) -> Callable[[], None]:
    """Makes a function that takes one step of a size alone, distilled from the full model."""
    lora = LoraConfig(
        task_type="CAUSAL_LM" if causal else "SEQ_CLS",
        r=8,
        lora_alpha=16,
        lora_dropout=0.0,
        target_modules="all-linear",
        modules_to_save=None if causal else ["classifier"],
    )
    student = get_peft_model(model, lora).train()
    optimizer = torch.optim.AdamW([p for p in student.parameters() if p.requires_grad], lr=RATE, fused=True)
    task = CausalLanguageModeling() if causal else Classification()

    def step() -> None:
        with torch.no_grad():
            target = teacher(**{name: value for name, value in batch.items() if name != "labels"})
        outputs = student(**batch)
        divergence = task.divergence(outputs, target, batch)
        ((1 - ALPHA) * outputs.loss + ALPHA * divergence).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def _train(model: str, subnets: tuple[Subnet, ...], batch: dict[str, Tensor], repeats: int) -> dict[str, Any]:
    supernet = supernet_of(model)
    teacher = load(model).eval().requires_grad_(False)
    variants: dict[str, Callable[[], Any]] = {"mlfs": mlfs_step(supernet, subnets, batch)}
    for subnet in subnets:
        twin = supernet_of(model).extract(subnet)
        variants[f"PEFT {subnet}"] = peft_step(twin, teacher, batch, causal=model == "decoder")
    variants["torch product"] = torch_product
    if why_no_cpp() is None:
        variants["extension product"] = extension_product
    times = alternate(variants, repeats, model)
    of_peft = {name.removeprefix("PEFT "): values for name, values in times.items() if name.startswith("PEFT")}
    peft = [sum(turn) for turn in zip(*of_peft.values(), strict=True)]
    rate = SQUARE_FLOPS / median(times["torch product"])
    extension_rate = 0.0
    if "extension product" in times:
        extension_rate = SQUARE_FLOPS / median(times["extension product"])
    floor = _linear_flops(supernet, subnets, batch) / rate
    relative = median(times["mlfs"]) / floor
    return {
        "sizes": {size: spread(values) for size, values in of_peft.items()},
        "mlfs": spread(times["mlfs"]),
        "PEFT": spread(peft),
        "floor": floor,
        "mlfs / PEFT": spread(ratios(times["mlfs"], peft)),
        "mlfs / floor": relative,
        "sgemm GFLOP/s": rate / 1e9,
        "extension GFLOP/s": extension_rate / 1e9,
        "mlfs / own floor": relative * extension_rate / rate,
        "tokens": int(batch["attention_mask"].sum()),
    }


def _linear_flops(supernet: SuperTransformer, subnets: tuple[Subnet, ...], batch: dict[str, Tensor]) -> int:
    """Counts the operations of the linear layers in one step over `subnets`, for the tokens that are no padding."""
    return sum(_flops_per_token(supernet, subnet) for subnet in subnets) * int(batch["attention_mask"].sum())


def _flops_per_token(supernet: SuperTransformer, subnet: Subnet) -> int:
    """Counts the operations for a token of the linear layers inside `subnet`: forward, and the gradient of their input.

    The head counts where it is one of the vocabulary's. Projections of the first layer need no gradient of their input.
    """
    layer_sizes, total = supernet.layer_sizes(subnet), 0
    first_layer = f"{supernet.layers_name}.{subnet.layers[0]}."
    projections = ("query", "key", "value", "q_proj", "k_proj", "v_proj")
    for name, module in supernet.model.named_modules():
        if not isinstance(module, ElasticLinear) or module.owned or "pooler" in name:
            continue
        columns, rows = module.read_sizes(layer_sizes)
        passes = 1 if name.startswith(first_layer) and name.endswith(projections) else 2
        total += 2 * rows * columns * passes
    return total
