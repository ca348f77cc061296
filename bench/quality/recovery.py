"""How much of a decoder's loss a slice of it wins back: validation loss over training, one size alone.

    python -m bench.quality.recovery                                       every run, most of an hour each on one core
    python -m bench.quality.recovery --runs 'two thirds' 'whole model'     some of them
    python -m bench.quality.recovery --table                               prints the recorded results

SmolLM2-135M on source of the standard library (other modules for validation), all weights, 4 blocks of 256 tokens a
step, warm-up and cosine, each run at the same learning rate (`FinishingTrainer`, what `mlfs finish` runs). Slices are
of the pretrained model: layers by loss and units by activation, measured on 32 blocks, unless a run says otherwise.
Nats per token on 32 blocks. Where the processor multiplies bf16, training runs in it (`--no-bf16` for fp32);
evaluation does too. Every run is kept as it ends, and is not run again.
"""

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, TrainerCallback, default_data_collator, set_seed

from bench.environment import ROOT, environment
from mlfs import MLFSArguments, SearchSpace, Subnet, SuperTransformer
from mlfs.commands.bases import load_tokenizer
from mlfs.data.arguments import DataArguments
from mlfs.data.builtin import stdlib_source
from mlfs.data.raw import prepare
from mlfs.data.tokens import tokenize
from mlfs.files import write_json
from mlfs.models.pretrained import SMOLLM2, find_model
from mlfs.report.table import table
from mlfs.training.finishing import FinishingTrainer

RESULTS = ROOT / "bench" / "results" / "recovery.json"
CALIBRATION = 32  # blocks
TAUGHT: dict[str, Any] = {"distill_alpha": 0.9, "distill_beta": [0.1]}
ALONE: dict[str, Any] = {"distill_alpha": 0.0, "distill_beta": [0.0]}
# What each run trains: its size, what it starts from, and what else is not as in "two thirds".
RUNS: dict[str, dict[str, Any]] = {
    "whole model": {"size": (576, 9, 1536, 30), "teaching": ALONE},
    "two thirds": {"size": (576, 9, 768, 28)},
    "two thirds, no teacher": {"size": (576, 9, 768, 28), "teaching": ALONE},
    "two thirds, by depth": {"size": (576, 9, 1536, 18)},
    "two thirds, by width": {"size": (480, 6, 1152, 30), "order": "gradient"},
    "two thirds, as before": {"size": (576, 9, 1152, 22), "order": "gradient", "layers": "even"},
    "two thirds, random start": {"size": (576, 9, 768, 28), "start": "random"},
    "half": {"size": (576, 9, 768, 18)},
    "two thirds, a third of the data": {"size": (576, 9, 768, 28), "share": 1 / 3},
    "two thirds, a tenth of the data": {"size": (576, 9, 768, 28), "share": 1 / 10},
}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", nargs="+", default=list(RUNS), choices=RUNS)
    parser.add_argument("--steps", type=int, default=240)
    parser.add_argument("--learning_rate", type=float, default=3e-4)
    parser.add_argument("--bf16", action=argparse.BooleanOptionalAction, default=multiplies_bf16())
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--table", action="store_true", help="print the recorded results and stop")
    given = parser.parse_args(arguments)
    for name in [] if given.table else given.runs:
        key = f"{name} ({given.steps} steps)"
        if str(given.seed) in _recorded(given.output).get(key, {}):
            continue
        origin = environment(given.seed)
        found = recover(RUNS[name], given) | {"environment": origin}
        recorded = _recorded(given.output)  # others may have ended meanwhile
        recorded.setdefault(key, {})[str(given.seed)] = found
        write_json(given.output, recorded)
        print(key, found["losses"], flush=True)
    print(show(_recorded(given.output)))


def multiplies_bf16() -> bool:
    """Tells whether matrices of bf16 are multiplied faster here than those of fp32."""
    return torch.cuda.is_available() or bool(torch.cpu._is_amx_tile_supported())


def recover(run: dict[str, Any], given: argparse.Namespace) -> dict[str, Any]:
    """Trains one size from its start; returns its validation losses by step, and the seconds it took."""
    train, validation = blocks(given.seed, int(run.get("share", 1.0) * 4 * given.steps))
    trainer = trainer_of(run, given, train, validation)
    losses: list[tuple[int, float]] = []

    class Keep(TrainerCallback):
        def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **_: Any) -> None:
            losses.append((state.global_step, metrics["eval_loss"]))

    trainer.add_callback(Keep())
    start = time.perf_counter()
    trainer.train()
    return {
        "losses": losses,
        "seconds": time.perf_counter() - start,
        "parameters": trainer.small.num_parameters(),
        "steps": given.steps,
        "learning_rate": given.learning_rate,
        "bf16": given.bf16,
    }


def blocks(seed: int, count: int) -> tuple[Any, Any]:
    """Makes blocks of 256 tokens: to calibrate on, then `count` to train on; and to validate on."""
    texts = [rows.select_columns(["text"]) for rows in stdlib_source(seed)]
    data = DataArguments(block_size=256, max_train_samples=CALIBRATION + count, max_eval_samples=32)
    sets = tokenize(prepare(*texts, data), load_tokenizer(SMOLLM2), data)
    return sets["train"], sets["validation"]


def trainer_of(run: dict[str, Any], given: argparse.Namespace, train: Any, validation: Any) -> FinishingTrainer:
    """Slices the pretrained model as a run says, and makes the trainer of the slice."""
    size, whole = Subnet(*run["size"]), Subnet(*RUNS["whole model"]["size"])
    axes = zip((whole.hidden, whole.heads, whole.ffn, whole.layers), run["size"], strict=True)
    space = SearchSpace(*(tuple(dict.fromkeys(choices)) for choices in axes))
    model = AutoModelForCausalLM.from_pretrained(find_model(SMOLLM2), dtype=torch.float32)
    set_seed(given.seed)
    supernet = SuperTransformer(model, space, rank=0, base_name=SMOLLM2)
    if size != space.max:
        calibration = DataLoader(train.select(range(CALIBRATION)), 4, collate_fn=default_data_collator)
        supernet.order(run.get("order", "activation"), calibration, layers=run.get("layers", "loss"))
    args = MLFSArguments(
        output_dir=str(ROOT / "runs" / "recovery"),
        seed=given.seed,
        max_steps=given.steps,
        per_device_train_batch_size=4,
        per_device_eval_batch_size=4,
        base_learning_rate=given.learning_rate,
        lr_scheduler_type="cosine",
        bf16=given.bf16,
        use_cpu=not torch.cuda.is_available(),
        eval_strategy="steps",
        eval_steps=max(given.steps // 8, 1),
        eval_on_start=True,
        logging_steps=10,
        save_strategy="no",
        report_to=[],
        **run.get("teaching", TAUGHT),
    )
    rest = train.select(range(CALIBRATION, len(train)))
    trainer = FinishingTrainer(
        supernet, size, args, train_dataset=rest, eval_dataset=validation, data_collator=default_data_collator
    )
    if run.get("start") == "random":
        set_seed(given.seed)
        trainer.small.load_state_dict(type(model)(trainer.small.config).state_dict())
    return trainer


def show(recorded: dict[str, Any]) -> str:
    """Lays out the losses by step, of each run the mean over its seeds."""
    rows = []
    for name, runs in recorded.items():
        found = list(runs.values())
        row = {"run": name, "parameters": found[0]["parameters"], "seeds": len(found)}
        for i, (step, _) in enumerate(found[0]["losses"]):
            row[str(step)] = f"{sum(run['losses'][i][1] for run in found) / len(found):.2f}"
        rows.append(row)
    return table(rows)


def _recorded(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.exists() else {}


if __name__ == "__main__":
    main()
