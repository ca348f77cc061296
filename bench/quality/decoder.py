"""What training makes of the sizes of a decoder: who teaches, and how fast.

    python -m bench.quality.decoder                       every variant, some 10 minutes each on two cores
    python -m bench.quality.decoder --variants frozen     some of them
    python -m bench.quality.decoder --table               prints the recorded results

SmolLM2-135M on source of the standard library (other modules for validation), units by activation and layers by
influence, stage 2 alone: 30 steps of 2 blocks of 256 tokens with three sizes each, adapters of rank 8. Nats per token
on 12 blocks. Every run is kept as it ends, and is not run again.
"""

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, default_data_collator, set_seed

from bench.environment import ROOT, environment
from mlfs import MLFSArguments, MLFSTrainer, SearchSpace, Subnet, SuperTransformer
from mlfs.commands.bases import load_tokenizer
from mlfs.data.arguments import DataArguments
from mlfs.data.builtin import stdlib_source
from mlfs.data.raw import prepare
from mlfs.data.tokens import tokenize
from mlfs.files import write_json
from mlfs.models.pretrained import SMOLLM2, find_model
from mlfs.report.table import table

RESULTS = ROOT / "bench" / "results" / "decoder.json"
SPACE = SearchSpace((576, 480), (9,), (1536, 1152, 768), (30, 28, 24))
SUBNETS = (SPACE.max, Subnet(576, 9, 768, 28), Subnet(480, 9, 1152, 28), Subnet(576, 9, 1536, 24), SPACE.min)
# Of `MLFSArguments`.
VARIANTS: dict[str, dict[str, Any]] = {
    "frozen": {},
    "frozen, lr 1e-3": {"subnet_rate_factor": 1.0, "warmup_steps": 0},
    "maxnet": {"teacher": "maxnet", "subnet_rate_factor": 1.0, "warmup_steps": 0},
    "maxnet, lr 3e-3": {"teacher": "maxnet"},
}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=VARIANTS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--table", action="store_true", help="print the recorded results and stop")
    given = parser.parse_args(arguments)
    recorded = json.loads(given.output.read_text()) if given.output.exists() else {}
    for name in [] if given.table else given.variants:
        runs = recorded.setdefault(name, {})
        if str(given.seed) not in runs:
            origin = environment(given.seed)
            runs[str(given.seed)] = {**train(VARIANTS[name], given.seed), "environment": origin}
            write_json(given.output, recorded)
    rows = [
        {"variant": name, "seed": seed, **{size: f"{loss:.3f}" for size, loss in found["loss"].items()}}
        for name, runs in recorded.items()
        for seed, found in runs.items()
    ]
    print(table(rows))


def train(options: dict[str, Any], seed: int) -> dict[str, Any]:
    """Trains one super-transformer; returns the loss of each size, and the seconds of training and evaluation."""
    train_texts, validation = stdlib_source(seed)
    tokenizer = load_tokenizer(SMOLLM2)
    data = DataArguments(block_size=256, max_train_samples=200, max_eval_samples=12)
    raw = prepare(train_texts.select_columns(["text"]), validation.select_columns(["text"]), data)
    sets = tokenize(raw, tokenizer, data)
    set_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(find_model(SMOLLM2), dtype=torch.float32)
    settings: dict[str, Any] = {
        "stages_to_train": [2],
        "max_steps": 30,
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 4,
        "subnets_per_step": 3,
        "order": "activation",
        "order_layers": "influence",
        "order_batches": 8,
        "palette": json.dumps({str(subnet): subnet.to_dict() for subnet in SUBNETS}),
        **options,
    }
    args = MLFSArguments(
        output_dir=str(ROOT / "runs" / "decoder"),
        overwrite_run=True,
        logging_steps=10,
        save_strategy="no",
        report_to=[],
        seed=seed,
        **settings,
    )
    trainer = MLFSTrainer(
        SuperTransformer(model, SPACE, base_name=SMOLLM2),
        args,
        train_dataset=sets["train"],
        eval_dataset=sets["validation"],
        data_collator=default_data_collator,
    )
    start = time.perf_counter()
    trainer.train()
    rows = trainer.results(trainer.evaluate())
    return {"loss": {row["subnet"]: row["loss"] for row in rows}, "seconds": time.perf_counter() - start}


if __name__ == "__main__":
    main()
