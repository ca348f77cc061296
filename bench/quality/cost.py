"""What a palette costs beside models trained alone, all weights each: time, memory and disk, for one size to 32.

    python -m bench.quality.cost           measures (some minutes; nothing else should run), then prints
    python -m bench.quality.cost --table   prints the recorded results

MiniLM, batches of 32 sentences of SST-2, as `bench.quality.training` trains them. A palette costs the same however many
sizes are taken from it; models trained alone add up. Both need the teacher, a fine-tuned whole model, which is left out
of both. Steps of all are timed in turns on the same batches, and every run takes as many steps: one pass.
"""

import argparse
import itertools
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from transformers import Trainer, TrainingArguments, set_seed

from bench.environment import ROOT, environment
from bench.memory import peak_memory
from bench.quality.palette import SPACE, SUBNETS, Distilled
from bench.quality.training import GLUE, PLAIN, RUNS, VARIANTS, Subject, arguments_of, load
from mlfs import MLFSArguments, MLFSTrainer, Subnet, SuperTransformer
from mlfs.files import write_json
from mlfs.report.table import table
from mlfs.training.teacher import FrozenTeacher

RESULTS = ROOT / "bench" / "results" / "cost.json"
PALETTES = {
    "adapters": VARIANTS["adapters"],
    "adapters and embeddings": VARIANTS["adapters and embeddings"],
    "all weights": VARIANTS["all weights, one stage"],
}
MOST = 32  # sizes; the first eight are those whose scores are reported
STEPS, UNTIMED = 14, 2
AT_ONCE = 8  # models that are held at once


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=GLUE)
    parser.add_argument("--only", choices=PARTS, help="measure one part")
    parser.add_argument("--sizes", type=int, default=MOST, help="how many are trained alone (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--table", action="store_true", help="print the recorded results and stop")
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.peak is not None:
        print(peak_of(given.peak, load(given.data / "SST-2", "SST-2"), given.seed))
        return
    for part in [] if given.table else [given.only] if given.only else PARTS:
        origin = environment(given.seed)
        found = PARTS[part](given)
        recorded = json.loads(given.output.read_text()) if given.output.exists() else {}
        environments = {**recorded.get("environments", {}), part: origin}
        write_json(given.output, {**recorded, **found, "environments": environments})
    print(show(json.loads(given.output.read_text())) if given.output.exists() else "not measured yet")


def measure_steps(given: argparse.Namespace) -> dict[str, Any]:
    """Times steps of palettes and of models trained alone in turns, and weighs what each keeps on disk.

    Returns:
        `sizes`; `milliseconds` a step and `disk` bytes, each of palettes by name and of sizes.
    """
    subject, sizes = load(given.data / "SST-2", "SST-2"), sizes_of(given.sizes, given.seed)
    palettes: dict[str, Any] = {name: palette_trainer(name, subject, given.seed) for name in PALETTES}
    batches = [batch for batch, _ in zip(palettes["adapters"].get_train_dataloader(), range(STEPS), strict=False)]
    of_palettes: dict[str, list[float]] = {name: [] for name in palettes}
    milliseconds: dict[str, float] = {}
    disk = {name: bytes_of(trainer.supernet) for name, trainer in palettes.items()}
    for start in range(0, len(sizes), AT_ONCE):
        alone: dict[str, Any] = {str(s): twin_trainer(s, subject, given.seed) for s in sizes[start : start + AT_ONCE]}
        taken: dict[str, list[float]] = {name: [] for name in palettes | alone}
        for number, batch in enumerate(batches):
            for name, trainer in (palettes | alone).items():
                trainer.state.global_step = start + number  # of a palette: other sizes are drawn at each
                taken[name].append(1e3 * seconds_of_step(trainer, batch))
        milliseconds |= {name: float(np.median(taken[name][UNTIMED:])) for name in alone}
        disk |= {name: bytes_of(trainer.model) for name, trainer in alone.items()}
        for name, times in of_palettes.items():
            times += taken[name][UNTIMED:]
    # steps of a palette are of different sizes: their mean counts
    milliseconds |= {name: float(np.mean(times)) for name, times in of_palettes.items()}
    return {"sizes": [str(size) for size in sizes], "milliseconds": milliseconds, "disk": disk}


def measure_memory(given: argparse.Namespace) -> dict[str, Any]:
    """Finds the `peak` bytes in training, of palettes by name and of the largest and the smallest size."""
    return {"peak": {name: _peak_elsewhere(name, given) for name in (*PALETTES, str(SPACE.max), str(SPACE.min))}}


PARTS = {"steps": measure_steps, "memory": measure_memory}


def sizes_of(count: int, seed: int) -> list[Subnet]:
    """Lists the sizes whose scores are reported, then others of the space, drawn."""
    rest = [subnet for subnet in all_sizes() if subnet not in SUBNETS]
    random.Random(seed).shuffle(rest)
    return [*SUBNETS, *rest][:count]


def all_sizes() -> list[Subnet]:
    """Lists the sizes of the space."""
    return [Subnet(*choice) for choice in itertools.product(SPACE.hidden, SPACE.heads, SPACE.ffn, SPACE.layers)]


def palette_trainer(name: str, subject: Subject, seed: int) -> MLFSTrainer:
    """Readies the last stage of a palette."""
    options = {**PLAIN, **PALETTES[name], "stages_to_train": [2], "stage_epochs": [1.0], "order": "none"}
    set_seed(seed)
    supernet = SuperTransformer(subject.model(), SPACE, base_name="")
    folder = RUNS / f"cost-{name.replace(' ', '-')}"
    trainer = MLFSTrainer(supernet, MLFSArguments(**arguments_of(seed, folder, **options)), **subject.of_trainer())
    trainer.stage = 2
    trainer.teach_with(FrozenTeacher(supernet))
    trainer._let_train()
    return _ready(trainer)  # type: ignore[return-value]


def twin_trainer(size: Subnet, subject: Subject, seed: int) -> Trainer:
    """Readies one size alone, of which all weights train, with the whole model as its teacher."""
    set_seed(seed)
    supernet = SuperTransformer(subject.model(), SPACE, base_name="")
    student = supernet.extract(size).requires_grad_(True)
    given = TrainingArguments(**arguments_of(seed, RUNS / "cost-twin", learning_rate=3e-4))
    trainer = Distilled(student, given, **subject.of_trainer())
    trainer.teacher = supernet.extract(SPACE.max).eval().requires_grad_(False)
    return _ready(trainer)


def _ready(trainer: Trainer) -> Trainer:
    trainer.create_optimizer()
    trainer.current_gradient_accumulation_steps = 1
    return trainer


def seconds_of_step(trainer: Any, batch: dict[str, Any]) -> float:
    """Times one step: forward, backward and update."""
    start = time.perf_counter()
    trainer.training_step(trainer.model, dict(batch))
    trainer.optimizer.step()
    trainer.optimizer.zero_grad()
    return time.perf_counter() - start


def bytes_of(model: Any) -> int:
    """Weighs what is kept: of a palette what its run saves, of a plain model its parameters."""
    if not isinstance(model, SuperTransformer):
        return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return sum(file.stat().st_size for file in Path(folder).rglob("*") if file.is_file())


def peak_of(name: str, subject: Subject, seed: int) -> int:
    """Trains some steps and returns the largest memory of this process, in bytes."""
    if name in PALETTES:
        trainer: Any = palette_trainer(name, subject, seed)
    else:
        trainer = twin_trainer(next(size for size in all_sizes() if str(size) == name), subject, seed)
    for batch, number in zip(trainer.get_train_dataloader(), range(STEPS), strict=False):
        trainer.state.global_step = number
        seconds_of_step(trainer, batch)
    return peak_memory()


def _peak_elsewhere(name: str, given: argparse.Namespace) -> int:
    """Asks a process of its own: memory that was freed still counts in the one that freed it."""
    command = [sys.executable, "-m", "bench.quality.cost", "--peak", name, "--data", str(given.data)]
    done = subprocess.run(
        [*command, "--seed", str(given.seed)], cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True
    )
    return int(done.stdout.split()[-1])


def crossing(palette: float, each: Sequence[float]) -> int | None:
    """Finds the number of sizes from which on a palette costs less than as many models; None where it never does."""
    sums = np.cumsum(each)
    return next((n + 1 for n, total in enumerate(sums) if total > palette), None)


def show(result: dict[str, Any]) -> str:
    """Lays out the cost of n models beside that of each palette, and where they cross."""
    sizes, names = result["sizes"], [name for name in PALETTES if name in result["milliseconds"]]
    rows = []
    for n in (count for count in (1, 2, 3, 4, 8, 16, 32) if count <= len(sizes)):
        row: dict[str, Any] = {"sizes": n}
        for what, unit in (("milliseconds", 1.0), ("disk", 1e6)):
            total = sum(result[what][size] for size in sizes[:n])
            row[f"{'MB' if what == 'disk' else 'ms a step'}, alone"] = f"{total / unit:.0f}"
            for name in names:
                row[f"{name}, share of {'bytes' if what == 'disk' else 'time'}"] = f"{result[what][name] / total:.2f}"
        rows.append(row)
    lines = [table(rows)]
    for name in names:
        time_from = crossing(result["milliseconds"][name], [result["milliseconds"][size] for size in sizes])
        disk_from = crossing(result["disk"][name], [result["disk"][size] for size in sizes])
        lines.append(
            f"{name}: {result['milliseconds'][name]:.0f} ms a step, {result['disk'][name] / 1e6:.1f} MB; "
            f"less time from {time_from} sizes on, fewer bytes from {disk_from}"
        )
    peaks = [f"{name} {peak / 1e9:.2f}" for name, peak in result.get("peak", {}).items()]
    lines.append(f"peak memory, GB: {', '.join(peaks)}")
    origin = result["environments"]["steps"]
    lines.append(f"{origin['cores']} cores, {origin['machine']}, torch {origin['torch']}, mlfs {origin['commit'][:12]}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
