"""Quality and training time of one palette against the same sizes trained alone with PEFT.

    python -m bench.quality.palette                      both sides, about half an hour on two cores
    python -m bench.quality.palette --only mlfs          one side; results of the other are kept
    python -m bench.quality.palette --table              prints the table of the recorded results

MiniLM on 16,000 sentences of SST-2. mlfs: stage 0 one pass, stages 1 and 2 together one pass. PEFT: each size alone,
LoRA of rank 8 on every linear, head trained, one pass, distilled from the fine-tuned full model (the first twin), from
slices of its own: leading ones of the pretrained weights, of shallow sizes layers 0, 2 and 4. Accuracy on the 872 dev
sentences after the last step.
"""

import argparse
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import (
    DataCollatorWithPadding,
    EvalPrediction,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
    set_seed,
)

from bench.environment import environment
from mlfs import MLFSArguments, MLFSTrainer, SearchSpace, Subnet, SuperTransformer
from mlfs.commands.bases import load_model, load_tokenizer
from mlfs.data.arguments import DataArguments
from mlfs.data.raw import RawData, load_raw
from mlfs.data.tokens import tokenize
from mlfs.files import write_json
from mlfs.models.pretrained import MINILM
from mlfs.ops import divergence
from mlfs.report.table import table

RESULTS = Path(__file__).parents[1] / "results" / "palette_quality.json"
ALL, HALF = 6, 3
SPACE = SearchSpace(hidden=(384, 288, 192), heads=(12, 9, 6), ffn=(1536, 1152, 768), layers=(ALL, HALF))
SUBNETS = (
    Subnet(384, 12, 1536, ALL),
    Subnet(288, 9, 1152, ALL),
    Subnet(192, 6, 768, ALL),
    Subnet(192, 6, 768, HALF),
    Subnet(384, 9, 1152, ALL),
    Subnet(384, 6, 768, ALL),
    Subnet(384, 12, 1536, HALF),
    Subnet(384, 6, 768, HALF),
)
ALPHA = 0.9  # share of the KL divergence, on both sides


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path(__file__).parents[3] / "shared" / "data" / "glue" / "SST-2")
    parser.add_argument("--only", choices=["mlfs", "peft"], help="run one side")
    parser.add_argument("--sentences", type=int, default=16_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--table", action="store_true", help="print the recorded results and stop")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=JSON", help="an option of MLFSArguments")
    given = parser.parse_args(arguments)
    if not given.table:
        run(given)
    print(show(json.loads(given.output.read_text())))


def run(given: argparse.Namespace) -> None:
    """Trains the sides that `given` names, and writes each one's figures as soon as there are any."""
    if not given.data.is_dir():
        raise SystemExit(f"{given.data} does not exist: give the folder of SST-2's train.tsv and dev.tsv with --data")
    data = DataArguments(
        train_file=str(given.data / "train.tsv"),
        validation_file=str(given.data / "dev.tsv"),
        max_train_samples=given.sentences,
    )
    raw, tokenizer = load_raw(data), load_tokenizer(MINILM)
    sets = tokenize(raw, tokenizer, data)
    result: dict[str, Any] = json.loads(given.output.read_text()) if given.output.exists() else {}
    result["sentences"] = given.sentences
    inputs = Inputs(raw, tokenizer, sets["train"], sets["validation"])
    options = {name: json.loads(value) for name, _, value in (word.partition("=") for word in given.set)}

    def keep(side: str, found: dict[str, Any]) -> None:
        result[side] = found
        result.setdefault("environments", {})[side] = origin
        write_json(given.output, result)

    origin = environment(given.seed)
    if given.only != "peft":
        result["parameters"], found = train_palette(inputs, given.seed, options)
        keep("mlfs", found)
    if given.only != "mlfs":
        for twins in train_twins(inputs, given.seed):
            keep("peft", twins)


@dataclass(frozen=True)
class Inputs:
    """Holds what both sides are trained and validated on: the same token ids."""

    raw: RawData
    tokenizer: PreTrainedTokenizerBase
    train: Dataset
    validation: Dataset

    def of_trainer(self) -> dict[str, Any]:
        """Returns the arguments of a Trainer that say what it reads, and how it measures."""
        return {
            "train_dataset": self.train,
            "eval_dataset": self.validation,
            "processing_class": self.tokenizer,
            "data_collator": DataCollatorWithPadding(self.tokenizer),
            "compute_metrics": accuracy,
        }


def train_palette(inputs: Inputs, seed: int, options: dict[str, Any]) -> tuple[dict[str, int], dict[str, Any]]:
    """Trains one super-transformer.

    Args:
        options: of `MLFSArguments`, in place of those below.

    Returns:
        The parameters of each size; and the seconds of the run and of each stage, each size's accuracy after the last
        step, the options, and the history of losses.
    """
    set_seed(seed)
    supernet = SuperTransformer(load_model(MINILM, inputs.raw, inputs.tokenizer), SPACE)
    settings: dict[str, Any] = {
        "stage_epochs": [1.0, 0.5, 0.5],
        "learning_rate": 1e-3,
        "distill_alpha": ALPHA,
        "palette": json.dumps({str(subnet): subnet.to_dict() for subnet in SUBNETS}),
        **options,
    }
    args = MLFSArguments(
        output_dir="runs/palette_quality",
        seed=seed,
        per_device_train_batch_size=32,
        per_device_eval_batch_size=32,
        logging_steps=25,
        save_strategy="no",
        report_to=[],
        overwrite_run=True,
        **settings,
    )
    start = time.perf_counter()
    trainer = MLFSTrainer(supernet, args, **inputs.of_trainer())
    metrics = trainer.train().metrics
    seconds = time.perf_counter() - start
    parameters = {str(subnet): supernet.count_parameters(subnet) for subnet in SUBNETS}
    return parameters, {
        "seconds": seconds,
        "stage_seconds": [metrics[f"stage_{stage}_train_runtime"] for stage in range(3)],
        "accuracy": {row["subnet"]: row["accuracy"] for row in trainer.results(trainer.evaluate())},
        "options": {name: value for name, value in settings.items() if name != "palette"},
        "history": [entry for entry in trainer.state.log_history if "loss" in entry],
    }


def train_twins(inputs: Inputs, seed: int) -> Iterator[dict[str, Any]]:
    """Trains each size alone with PEFT; the first, the full model, becomes the teacher of the others.

    Yields, after each size, the seconds and the accuracy of every size so far.
    """
    teacher: PreTrainedModel | None = None
    twins: dict[str, Any] = {}
    for subnet in SUBNETS:
        set_seed(seed)
        slices = SuperTransformer(load_model(MINILM, inputs.raw, inputs.tokenizer), SPACE).extract(subnet)
        lora = LoraConfig(
            task_type="SEQ_CLS",
            r=8,
            lora_alpha=16,
            lora_dropout=0.0,
            target_modules="all-linear",
            modules_to_save=["classifier"],
        )
        model = get_peft_model(slices, lora)
        args = TrainingArguments(
            output_dir="runs/palette_quality-peft",
            seed=seed,
            num_train_epochs=1,
            learning_rate=1e-3,
            per_device_train_batch_size=32,
            per_device_eval_batch_size=32,
            logging_steps=25,
            save_strategy="no",
            report_to=[],
        )
        trainer = Distilled(model, args, **inputs.of_trainer())
        trainer.teacher = teacher
        start = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - start
        twins[str(subnet)] = {"seconds": seconds, "accuracy": trainer.evaluate()["eval_accuracy"]}
        yield dict(twins)
        if teacher is None:
            teacher = model.merge_and_unload().eval().requires_grad_(False)


class Distilled(Trainer):
    """Trains with the loss (1 − α) task + α KL(teacher ‖ model), once it has a teacher."""

    teacher: PreTrainedModel | None = None

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        outputs = model(**inputs)
        loss = outputs.loss
        if self.teacher is not None and model.training:
            with torch.no_grad():
                target = self.teacher(**{name: value for name, value in inputs.items() if name != "labels"}).logits
            loss = (1 - ALPHA) * loss + ALPHA * divergence(outputs.logits, target)
        return (loss, outputs) if return_outputs else loss


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    """Computes the share of sentences whose largest logit is the label's."""
    logits = prediction.predictions[0] if isinstance(prediction.predictions, tuple) else prediction.predictions
    return {"accuracy": float((logits.argmax(-1) == prediction.label_ids).mean())}


def show(result: dict[str, Any]) -> str:
    """Lays out accuracy and time of every size, and where the figures come from."""
    ours, twins = result.get("mlfs", {}), result.get("peft", {})
    rows: list[dict[str, Any]] = []
    for subnet in map(str, SUBNETS):
        row: dict[str, Any] = {"hidden/heads/ffn/layers": subnet}
        if ours:
            row["mlfs, %"] = f"{100 * ours['accuracy'][subnet]:.1f}"
        if subnet in twins:
            row["PEFT twin, %"] = f"{100 * twins[subnet]['accuracy']:.1f}"
            row["PEFT twin, s"] = f"{twins[subnet]['seconds']:.0f}"
        rows.append(row)
    lines = [table(rows)]
    for side, origin in result.get("environments", {}).items():
        seed, torch_version = origin["seed"], origin["torch"]
        lines.append(f"{side}: {origin['cores']} cores, {origin['machine']}, torch {torch_version}, seed {seed}")
    if ours:
        lines.append(
            f"mlfs, all sizes: {ours['seconds']:.0f} s (stages {', '.join(f'{s:.0f}' for s in ours['stage_seconds'])})"
        )
    if len(twins) == len(SUBNETS):
        total = sum(twin["seconds"] for twin in twins.values())
        lines.append(f"PEFT, all sizes: {total:.0f} s" + (f"; ratio {ours['seconds'] / total:.2f}" if ours else ""))
    return "\n".join(lines)


if __name__ == "__main__":
    main()
