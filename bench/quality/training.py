"""What training makes of a palette: variants of the method, beside each size trained alone with all of its weights.

    python -m bench.quality.training --only teachers                  the whole model, fine-tuned: stage 0
    python -m bench.quality.training --only palettes --variants 'all weights'
    python -m bench.quality.training --only twins                     the strong alternative: one size a run
    python -m bench.quality.training --only finished --sizes 2 3      sizes of a palette that train on alone
    python -m bench.quality.training --table                          prints the recorded results

MiniLM on 16,000 sentences of SST-2, or all of another task's examples. Teachers are fine-tuned once for each seed, and
kept in `runs/`; palettes are trained from one in stages 1 and 2, half a pass each, unless a variant says otherwise;
twins are the same slices of the same teacher, ordered the same way, each trained alone for one pass with all of its
weights, distilled from that teacher; what is finished trains on alone after the palette, for half a pass, as `mlfs
finish` does. Every run is kept as it ends, and is not run again. Scores are the task's metric on the dev set, and on
examples of the training set that were held back, by which settings are chosen.
"""

import argparse
import json
import os
import re
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments, set_seed

from bench.environment import ROOT, environment
from bench.quality.palette import SPACE, SUBNETS, Distilled, Inputs
from mlfs import MLFSArguments, MLFSTrainer, SuperTransformer
from mlfs.commands.bases import load_model, load_tokenizer
from mlfs.data.arguments import DataArguments
from mlfs.data.metrics import compute_metrics_for
from mlfs.data.raw import load_raw
from mlfs.data.tokens import tokenize
from mlfs.files import write_json
from mlfs.models.pretrained import MINILM
from mlfs.report.table import table
from mlfs.supernet.checkpoint import CONFIG_NAME
from mlfs.training.finishing import FinishingTrainer

RESULTS = ROOT / "bench" / "results" / "training.json"
GLUE = ROOT.parent / "shared" / "data" / "glue"
RUNS = ROOT / "runs" / "training"
HELD_BACK = 3000  # at most, and at most a tenth of a task's examples
TRAINED = {"SST-2": 16_000}  # of all there are, where not all

# What variants change, of `MLFSArguments`: the method without what was found to help it.
PLAIN: dict[str, Any] = {
    "learning_rate": 1e-3, "teacher": "maxnet", "subnet_rate_factor": 1.0, "warmup_steps": 0, "train_embeddings": False,
}  # fmt: skip
FROZEN: dict[str, Any] = {"teacher": "frozen", "warmup_steps": 0.1}
ONE_STAGE: dict[str, Any] = {"stages_to_train": [2], "stage_epochs": [1.0]}
BESIDE: dict[str, Any] = {**FROZEN, **ONE_STAGE, "learning_rate": 3e-3, "base_learning_rate": 3e-4}
BEST: dict[str, Any] = {**BESIDE, "train_embeddings": True}
# For stage 0.
TEACHERS: dict[str, dict[str, Any]] = {
    "adapters": {},
    "adapters, warm-up": {"warmup_steps": 0.1},
    "adapters and embeddings, warm-up": {"warmup_steps": 0.1, "train_embeddings": True},
    "base": {"train_base": [0]},
    "base, warm-up": {"warmup_steps": 0.1, "train_base": [0]},
}
# For stages 1 and 2; "from" names another teacher than `base`, "average" is the decay of `Averaged`.
VARIANTS: dict[str, dict[str, Any]] = {
    "adapters": {**FROZEN, "learning_rate": 3e-3},
    "adapters, lr 1e-3": {"teacher": "frozen"},
    "adapters, rank 32": {**FROZEN, "learning_rate": 3e-3, "rank": 32, "lora_alpha": 32},
    "adapters, one stage": {**FROZEN, **ONE_STAGE, "learning_rate": 3e-3},
    "adapters and embeddings": {**FROZEN, "learning_rate": 3e-3, "base_learning_rate": 3e-4, "train_embeddings": True},
    "adapters and norms, one stage": {**BESIDE, "train_norms": True},
    "adapters and embeddings, one stage": BEST,
    "adapters, norms and embeddings, one stage": {**BEST, "train_norms": True},
    "adapters, maxnet teaches": {"warmup_steps": 0.1, "learning_rate": 3e-3},
    "adapters, maxnet teaches, lr 1e-3": {},
    "all weights": {**FROZEN, "train_base": [1, 2], "base_learning_rate": 2e-4},
    "all weights, lr 4e-4": {**FROZEN, "train_base": [1, 2], "base_learning_rate": 4e-4},
    "all weights, one stage": {**FROZEN, **ONE_STAGE, "train_base": [2], "base_learning_rate": 3e-4},
    "all weights, maxnet teaches": {"train_base": [1, 2], "base_learning_rate": 2e-4, "warmup_steps": 0.1},
    "all weights, maxnet teaches, lr 1e-4": {"train_base": [1, 2], "base_learning_rate": 1e-4},
    # One thing each that differs from "adapters and embeddings, one stage".
    "gamma 0": {**BEST, "gamma": 0.0},
    "gamma 1": {**BEST, "gamma": 1.0},
    "alpha 0.5": {**BEST, "distill_alpha": 0.5},
    "alpha 1": {**BEST, "distill_alpha": 1.0},
    "beta 0": {**BEST, "distill_beta": [0.0]},
    "beta 1": {**BEST, "distill_beta": [1.0]},
    "hidden states of the last layer alone": {**BEST, "distill_beta": [0.0, 0.0, 0.0, 0.0, 0.0, 0.1]},
    "temperature 2": {**BEST, "temperature": 2.0},
    "rank 2": {**BEST, "rank": 2, "lora_alpha": 4.0},
    "rank 32": {**BEST, "rank": 32, "lora_alpha": 64.0},
    "cosine": {**BEST, "lr_scheduler_type": "cosine"},
    "batches of 16": {**BEST, "per_device_train_batch_size": 16},
    "two sizes a step": {**BEST, "subnets_per_step": 2},
    "six sizes a step": {**BEST, "subnets_per_step": 6},
    "sizes drawn at random": {**BEST, "subnet_sampling": "random"},
    "averaged weights": {**BEST, "average": 0.99},
}  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", default="SST-2", help="a folder of --data; SST-2:2000 takes so many examples")
    parser.add_argument("--data", type=Path, default=GLUE)
    parser.add_argument("--only", choices=["teachers", "palettes", "twins", "finished"], help="one kind of run")
    parser.add_argument("--teachers", nargs="+", default=["base"], help=f"of {', '.join(TEACHERS)}, or JSON of options")
    parser.add_argument(
        "--variants", nargs="+", default=["adapters", "all weights"], help=f"of {'; '.join(VARIANTS)}; or JSON"
    )
    parser.add_argument(
        "--sizes", nargs="+", type=int, default=range(1, len(SUBNETS)), help="of twins and finished, by number"
    )
    parser.add_argument("--rates", nargs="+", type=float, default=[3e-4], help="learning rates of twins and finished")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--table", action="store_true", help="print the recorded results and stop")
    given = parser.parse_args(arguments)
    recorded = json.loads(given.output.read_text()) if given.output.exists() else {}
    if not given.table:
        run(given, recorded)
    print(show(recorded))


def run(given: argparse.Namespace, recorded: dict[str, Any]) -> None:
    """Does what `given` names and is not in `recorded`, and writes each result as soon as there is one."""
    subject = load(given.data / given.task.partition(":")[0], given.task)

    def once(kind: str, name: str, seed: int, work: Any) -> None:
        rows = recorded.setdefault(given.task, {}).setdefault(kind, {}).setdefault(name, {})
        if str(seed) not in rows:
            origin = environment(seed)  # of the code that runs, before anyone commits more
            rows[str(seed)] = {**work(), "environment": origin}
            _record(given.output, (given.task, kind, name, str(seed)), rows[str(seed)])
            print(kind, name, seed, {k: v for k, v in rows[str(seed)].items() if k not in ("environment", "options")})

    for seed in given.seeds:
        if given.only in (None, "teachers"):
            for name in given.teachers:
                once("teachers", name, seed, lambda name=name, seed=seed: train_teacher(subject, name, seed))
        if given.only in (None, "palettes"):
            for name in given.variants:
                once("palettes", name, seed, lambda name=name, seed=seed: train_palette(subject, name, seed))
        if given.only in (None, "twins"):
            for rate in given.rates:
                for size in given.sizes:
                    name = f"{SUBNETS[size]}, lr {rate:g}"
                    once("twins", name, seed, lambda *a, n=size, r=rate, s=seed: train_twin(subject, n, r, s))
        if given.only == "finished":
            for name in given.variants:
                for rate in given.rates:
                    once(
                        "finished",
                        f"{name}, lr {rate:g}",
                        seed,
                        lambda n=name, r=rate, s=seed: train_finished(subject, n, r, s, given.sizes),
                    )


def _record(path: Path, keys: Sequence[str], row: dict[str, Any]) -> None:
    """Adds a row to what the file holds by now: other runs may have ended meanwhile."""
    recorded = json.loads(path.read_text()) if path.exists() else {}
    *outer, last = keys
    place = recorded
    for key in outer:
        place = place.setdefault(key, {})
    place[last] = row
    write_json(path, recorded)


@dataclass(frozen=True)
class Subject(Inputs):
    """Holds a task: what is trained on, the dev set (`validation`), and what is held back of the training examples."""

    name: str
    held_back: Dataset

    def of_trainer(self) -> dict[str, Any]:
        """Returns the arguments of a Trainer that say what it reads, and how it measures."""
        metrics = compute_metrics_for(self.raw.task, self.raw.glue_name, self.raw.num_labels or None)
        return super().of_trainer() | {"compute_metrics": metrics}

    def model(self) -> PreTrainedModel:
        """Loads the pretrained model with a new head."""
        return load_model(MINILM, self.raw, self.tokenizer)


def load(folder: Path, name: str) -> Subject:
    """Reads a task, and holds some of its training examples back: of SST-2, whose examples are parts of each other,
    only such as share no five words with one that is trained on."""
    if not folder.is_dir():
        raise SystemExit(f"{folder} does not exist: give the folder of GLUE's tasks with --data")
    data = DataArguments(train_file=str(folder / "train.tsv"), validation_file=str(folder / "dev.tsv"))
    raw, tokenizer = load_raw(data), load_tokenizer(MINILM)
    sets = tokenize(raw, tokenizer, data)
    whole = sets["train"]
    order = np.random.default_rng(0).permutation(len(whole))
    number = name.partition(":")[2]
    count = int(number) if number else TRAINED.get(name, len(whole) - min(HELD_BACK, len(whole) // 10))
    train, rest = whole.select(np.sort(order[:count])), whole.select(np.sort(order[count:]))
    if folder.name == "SST-2":
        seen = {words for ids in train["input_ids"] for words in _fives(ids)}
        apart = [i for i, ids in enumerate(rest["input_ids"]) if seen.isdisjoint(_fives(ids)) and len(ids) > 6]
        rest = rest.select(apart[:HELD_BACK])
    return Subject(raw, tokenizer, train, sets["validation"], name.replace(":", "-"), rest)


def _fives(ids: Sequence[int]) -> list[tuple[int, ...]]:
    """Lists the runs of five tokens of an example, without those that begin and end it."""
    return [tuple(ids[i : i + 5]) for i in range(1, len(ids) - 5)]


def arguments_of(seed: int, folder: Path, **options: Any) -> dict[str, Any]:
    """Returns what all trainers have in common."""
    return {
        "output_dir": str(folder),
        "seed": seed,
        "per_device_train_batch_size": 32,
        "per_device_eval_batch_size": 64,
        "logging_steps": 25,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        **options,
    }


def scores(trainer: Trainer, subject: Subject) -> dict[str, Any]:
    """Evaluates what a trainer has trained on the dev set and on what was held back: every size of a palette."""
    found = {}
    for name, rows in (("dev", subject.validation), ("held_back", subject.held_back)):
        metrics = trainer.evaluate(rows)
        if isinstance(trainer, MLFSTrainer):
            found[name] = {row["subnet"]: _score(row) for row in trainer.results(metrics)}
        else:
            found[name] = _score({key.removeprefix("eval_"): value for key, value in metrics.items()})
    return found


def _score(metrics: dict[str, Any]) -> float:
    """The metric that counts: accuracy; of scored pairs the correlation."""
    return float(next(metrics[name] for name in ("accuracy", "pearson", "loss") if name in metrics))


def train_teacher(subject: Subject, name: str, seed: int) -> dict[str, Any]:
    """Fine-tunes the whole model, and keeps it in `RUNS`."""
    set_seed(seed)
    folder = _teacher_folder(subject, name, seed)
    supernet = SuperTransformer(subject.model(), SPACE)
    palette = json.dumps({"max": SPACE.max.to_dict()})
    options = {**PLAIN, "num_train_epochs": 1.0, **_options(TEACHERS, name)}
    given = arguments_of(seed, folder, stages_to_train=[0], overwrite_run=True, palette=palette, **options)
    trainer = MLFSTrainer(supernet, MLFSArguments(**given), **subject.of_trainer())
    start = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - start
    found = scores(trainer, subject)
    return {"seconds": seconds, **{key: next(iter(value.values())) for key, value in found.items()}, "options": options}


def train_palette(subject: Subject, name: str, seed: int) -> dict[str, Any]:
    """Trains stages 1 and 2 from a teacher, as a variant says."""
    trainer, options = palette_trainer(subject, name, seed)
    start = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - start
    found = scores(trainer, subject)
    shutil.rmtree(trainer.run_folder)
    return {"seconds": seconds, **found, "options": options}


def train_finished(subject: Subject, name: str, rate: float, seed: int, sizes: Sequence[int]) -> dict[str, Any]:
    """Trains a palette, then each of `sizes` on alone; returns their scores before and after."""
    trainer, options = palette_trainer(subject, name, seed)
    trainer.train()
    before = scores(trainer, subject)
    found: dict[str, Any] = {"dev": {}, "held_back": {}, "options": options, "seconds": 0.0}
    for size in sizes:
        set_seed(seed)
        given = arguments_of(seed, RUNS / "finished", num_train_epochs=0.5, base_learning_rate=rate, warmup_steps=0.1)
        alone = FinishingTrainer(trainer.supernet, SUBNETS[size], MLFSArguments(**given), **subject.of_trainer())
        start = time.perf_counter()
        alone.train()
        found["seconds"] += time.perf_counter() - start
        for measured, score in scores(alone, subject).items():
            small = str(SUBNETS[size])
            found[measured] |= {f"{small} before": before[measured][small], small: score}
    shutil.rmtree(trainer.run_folder)
    return found


def palette_trainer(subject: Subject, name: str, seed: int) -> tuple[MLFSTrainer, dict[str, Any]]:
    """Makes the trainer of a variant, and returns its options."""
    options = {**PLAIN, "stage_epochs": [0.5], **_options(VARIANTS, name)}
    callbacks = [Averaged(options.pop("average"))] if "average" in options else []
    supernet = _from_teacher(subject, options.pop("from", "base"), seed, options)
    set_seed(seed)
    palette = json.dumps({str(subnet): subnet.to_dict() for subnet in SUBNETS})
    folder = RUNS / f"palette-{os.getpid()}"
    given = arguments_of(seed, folder, **{"stages_to_train": [1, 2], "palette": palette, **options}, overwrite_run=True)
    return MLFSTrainer(supernet, MLFSArguments(**given), callbacks=callbacks, **subject.of_trainer()), options


class Averaged(TrainerCallback):
    """Keeps a moving average of what trains, and leaves it in place of the last weights."""

    def __init__(self, decay: float) -> None:
        self.decay = decay
        self.average: dict[str, torch.Tensor] = {}

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """Takes the weights after an update in."""
        for name, weight in model.named_parameters():
            if weight.requires_grad:
                before = self.average.setdefault(name, weight.detach().clone())
                before.lerp_(weight.detach(), 1 - self.decay)

    def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """Puts the average into the model."""
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if name in self.average:
                    weight.copy_(self.average[name])


def train_twin(subject: Subject, size: int, rate: float, seed: int) -> dict[str, Any]:
    """Trains one size alone: a slice of the teacher, ordered as a palette's, all of whose weights train."""
    trainer = twin_trainer(subject, size, rate, seed)
    start = time.perf_counter()
    trainer.train()
    return {"seconds": time.perf_counter() - start, **scores(trainer, subject)}


def twin_trainer(subject: Subject, size: int, rate: float, seed: int) -> Trainer:
    """Makes the trainer of one size alone."""
    supernet = _from_teacher(subject, "base", seed, {})
    teacher = supernet.extract(supernet.space.max).eval().requires_grad_(False)
    set_seed(seed + 1)
    loader = Trainer(args=TrainingArguments(**arguments_of(seed, RUNS / "twin")), model=teacher, **subject.of_trainer())
    batches = [batch for batch, _ in zip(loader.get_train_dataloader(), range(30), strict=False)]
    supernet.order("gradient", batches)
    student = supernet.extract(SUBNETS[size]).requires_grad_(True)
    set_seed(seed)
    given = arguments_of(seed, RUNS / "twin", num_train_epochs=1, learning_rate=rate)
    trainer = Distilled(student, TrainingArguments(**given), **subject.of_trainer())
    trainer.teacher = teacher
    return trainer


def _from_teacher(subject: Subject, name: str, seed: int, options: dict[str, Any]) -> SuperTransformer:
    """Makes a super-transformer whose base is a teacher."""
    folder = _teacher_folder(subject, name, seed)
    if not (folder / CONFIG_NAME).is_file():  # it was recorded on another machine
        train_teacher(subject, name, seed)
    saved = SuperTransformer.from_pretrained(folder, subject.model())
    set_seed(seed)
    whole = saved.extract(saved.space.max)
    rank = options.get("rank", 8)
    return SuperTransformer(whole, SPACE, rank=rank, alpha=options.get("lora_alpha", 16.0), base_name="")


def _teacher_folder(subject: Subject, name: str, seed: int) -> Path:
    return RUNS / f"{subject.name}-{re.sub('[^a-z0-9.]+', '-', name.lower())}-{seed}"


def _options(known: dict[str, dict[str, Any]], name: str) -> dict[str, Any]:
    """The options of a variant, or those that its name spells out."""
    return json.loads(name) if name.startswith("{") else known[name]  # type: ignore[no-any-return]


def show(recorded: dict[str, Any]) -> str:
    """Lays the scores out, a row for each run's mean over its seeds."""
    parts = []
    for task, kinds in recorded.items():
        for measured in ("dev", "held_back"):
            rows = []
            for kind, runs in kinds.items():
                for name, seeds in runs.items():
                    rows.append({"run": f"{kind[:-1]}: {name}", **_means(list(seeds.values()), measured)})
            parts.append(f"{task}, {measured}\n{table(rows)}")
    return "\n\n".join(parts)


def _means(runs: list[dict[str, Any]], measured: str) -> dict[str, str]:
    """The mean score of each size, and the seconds, over the seeds."""
    scored = [run[measured] if isinstance(run[measured], dict) else {"alone": run[measured]} for run in runs]
    row = {size: f"{100 * np.mean([found[size] for found in scored]):.1f}" for size in scored[0]}
    return {"seeds": str(len(runs)), "seconds": f"{np.mean([run['seconds'] for run in runs]):.0f}", **row}


if __name__ == "__main__":
    main()
