"""From names of a model and of data to a trainer: what the command line and the demo share."""

import json
import shutil
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging

from mlfs.arguments import MLFSArguments
from mlfs.checkpoint import write_json
from mlfs.data import DataArguments, RawData, collator, load_raw, tokenize
from mlfs.errors import MLFSError
from mlfs.extract import nearest_expressible, why_inexpressible
from mlfs.metrics import compute_metrics_for, preprocess_logits_for_metrics
from mlfs.palette import table
from mlfs.pretrained import SHORT_NAMES, find_model
from mlfs.subnet import SearchSpace, Subnet
from mlfs.supernet import SuperTransformer
from mlfs.trainer import MLFSTrainer

DATA_NAME = "data.json"
RESULTS_NAME = "results.json"


@dataclass
class ModelArguments:
    """Which model, and the sizes to offer."""

    model: str = field(metadata={"help": "A Hub name, or a folder; also minilm, smollm2."})
    space: str | None = field(
        default=None,
        metadata={
            "help": "Sizes on offer, as JSON: {hidden: [...], heads: [...], ffn: [...], layers: [counts or lists]}; "
            "largest first. Default: the model's own, two thirds and half of the width, half and quarter feed-forward, "
            "all layers and every other one."
        },
    )
    per_layer: bool = field(default=False, metadata={"help": "Draw heads and feed-forward sizes anew for each layer."})
    revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of the model on the Hub."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Run code that the model's repository brings."})

    def search_space(self) -> SearchSpace | None:
        """The space asked for; None for the default."""
        if self.space is None:
            return None
        try:
            value = json.loads(self.space)
        except ValueError as error:
            raise MLFSError(f"--space is not JSON ({error}): expected {{hidden, heads, ffn, layers}}") from None
        return SearchSpace.from_dict(value)


def load_tokenizer(name: str, **options: Any) -> PreTrainedTokenizerBase:
    """The tokenizer of a model, with a padding token: its own, else the end-of-sequence token."""
    with _readable("tokenizer", name):
        tokenizer = AutoTokenizer.from_pretrained(find_model(name), **options)
    if tokenizer.pad_token is None and tokenizer.eos_token is not None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(name: str, raw: RawData, tokenizer: PreTrainedTokenizerBase, **options: Any) -> PreTrainedModel:
    """The pretrained model in fp32 with a head for the task of `raw`."""
    options = {"dtype": torch.float32} | options
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # that the head is new is expected
    try:
        with _readable("model", name):
            if raw.task == "causal-lm":
                model = AutoModelForCausalLM.from_pretrained(find_model(name), **options)
            else:
                labels: dict[str, Any] = {"num_labels": raw.num_labels}
                if raw.task == "classification":
                    labels |= {"id2label": raw.id2label, "label2id": raw.label2id}
                else:
                    labels["problem_type"] = "regression"
                model = AutoModelForSequenceClassification.from_pretrained(find_model(name), **labels, **options)
    finally:
        logging.set_verbosity(verbosity)
    if getattr(model.config, "pad_token_id", None) is None:
        model.config.pad_token_id = tokenizer.pad_token_id
    return model


def max_length(model: PreTrainedModel) -> int | None:
    """Tokens the model takes; None where it does not say."""
    positions = getattr(model.config, "max_position_embeddings", None)
    # RoBERTa counts positions from after its padding index.
    offset = model.config.pad_token_id + 1 if model.config.model_type == "roberta" else 0
    return positions - offset if positions else None


def make_trainer(
    supernet: SuperTransformer,
    raw: RawData,
    tokenizer: PreTrainedTokenizerBase,
    data: DataArguments,
    args: MLFSArguments,
) -> MLFSTrainer:
    """A trainer of `supernet` on the data, with the task's metrics."""
    sets = tokenize(raw, tokenizer, data, max_length(supernet.model))
    causal = raw.task == "causal-lm"
    return MLFSTrainer(
        supernet,
        args,
        train_dataset=sets.get("train"),
        eval_dataset=sets.get("validation"),
        processing_class=tokenizer,
        data_collator=collator(raw.task, tokenizer),
        compute_metrics=compute_metrics_for(raw.task, raw.glue_name, raw.num_labels or None),
        preprocess_logits_for_metrics=preprocess_logits_for_metrics if causal else None,
    )


def train(model_args: ModelArguments, data: DataArguments, args: MLFSArguments) -> list[dict[str, Any]]:
    """Trains, evaluates the palette, prints the table and writes `results.json`; returns its rows."""
    raw = load_raw(data)
    if raw.train is None:
        raise MLFSError("no training data: give --train_file or --dataset_name")
    if raw.validation is None:
        raise MLFSError("no validation data: give --validation_file, or --validation_fraction 0.1 to hold some out")
    options = {"revision": model_args.revision, "trust_remote_code": model_args.trust_remote_code}
    tokenizer = load_tokenizer(model_args.model, **options)
    torch.manual_seed(args.seed)  # of the new head and the adapters
    model = load_model(model_args.model, raw, tokenizer, **options)
    supernet = make_supernet(model, model_args, args)
    trainer = make_trainer(supernet, raw, tokenizer, data, args)
    save_data_arguments(Path(args.output_dir or "."), data, raw)
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint and _flag(args.resume_from_checkpoint))
    return finish(trainer, raw)


def make_supernet(model: PreTrainedModel, model_args: ModelArguments, args: MLFSArguments) -> SuperTransformer:
    """The super-transformer the arguments ask for; the base is recorded under the name the user gave."""
    space = model_args.search_space()
    name = SHORT_NAMES.get(model_args.model, model_args.model)
    supernet = SuperTransformer(model, space, args.rank, alpha=args.lora_alpha, base_name=name)
    if model_args.per_layer:
        supernet.space = supernet.space.with_per_layer()
    return supernet


def finish(trainer: MLFSTrainer, raw: RawData) -> list[dict[str, Any]]:
    """Evaluates the palette, prints it as a table and writes it as JSON."""
    rows = trainer.results(trainer.evaluate())
    if trainer.is_world_process_zero():
        print("\n" + results_table(rows, raw.task))
        path = trainer.run_folder / RESULTS_NAME
        write_json(path, {"task": raw.task, "palette": rows})
        print(f"\nwritten to {path}")
    return rows


def results_table(rows: list[dict[str, Any]], task: str) -> str:
    """Subnet (hidden/heads/ffn/layers), parameters, size on disk, latency of a batch, and the task's metrics."""
    hidden = {"sizes", "runtime", "samples_per_second", "steps_per_second"}
    order = ["name", "subnet", "parameters", "bytes", "latency"]
    return table(
        [
            {k: row[k] for k in order if k in row} | {k: v for k, v in row.items() if k not in {*order, *hidden}}
            for row in rows
        ]
    )


def evaluate(run: Path, subnet: str, data: DataArguments | None, batch_size: int) -> dict[str, Any]:
    """Scores one subnet of a run on validation data (the run's own unless `data` names some)."""
    supernet, tokenizer = load_run(run)
    chosen = find_subnet(supernet, subnet, run)
    recorded, id2label = load_data_arguments(run)
    settings = asdict(recorded)
    if data is not None:  # what is not said again is as it was in training
        named = {k: v for k, v in asdict(data).items() if v != getattr(DataArguments(), k)}
        if named.keys() & {"validation_file", "dataset_name"}:
            settings |= {"train_file": None, "validation_file": None, "dataset_name": None}
        settings |= named
    if settings["validation_file"]:
        settings["train_file"] = None
    data = DataArguments(**settings)
    raw = load_raw(data, id2label)
    if raw.validation is None:
        raise MLFSError("no validation data: give --validation_file")
    with tempfile.TemporaryDirectory() as scratch:
        args = MLFSArguments(output_dir=scratch, per_device_eval_batch_size=batch_size, report_to=[])
        trainer = make_trainer(supernet, raw, tokenizer, data, args)
        trainer.palette = {"subnet": chosen}
        trainer.log = lambda *_, **__: None  # type: ignore[method-assign]  # one JSON object is all that is printed
        row = trainer.results(trainer.evaluate())[0]
    return {
        "run": str(run),
        "task": raw.task,
        "samples": len(raw.validation),
        **{k: v for k, v in row.items() if k != "name"},
    }


def export(run: Path, subnet: str, output_dir: Path, overwrite: bool = False) -> Path:
    """Writes one subnet of a run as a transformers checkpoint, with tokenizer and model card; all or nothing."""
    if output_dir.exists() and not output_dir.is_dir():
        raise MLFSError(f"{output_dir} is a file: give a folder")
    if output_dir.exists() and any(output_dir.iterdir()) and not overwrite:
        raise MLFSError(f"{output_dir} is not empty: give another folder, or --overwrite to replace it")
    supernet, tokenizer = load_run(run)
    chosen = find_subnet(supernet, subnet, run)
    if not supernet.is_expressible(chosen):
        near = nearest_expressible(chosen, supernet.space, supernet.family, supernet.dimensions)
        raise MLFSError(why_inexpressible(chosen, supernet.family, near))
    small = supernet.extract(chosen)
    output_dir.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".tmp-", dir=output_dir.parent) as scratch:
        folder = Path(scratch) / "checkpoint"
        try:
            small.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            (folder / "README.md").write_text(model_card(supernet, chosen, small), encoding="utf-8")
        except OSError as error:
            raise MLFSError(
                f"could not write {output_dir}: {error}. Free some disk space, or export elsewhere"
            ) from error
        if output_dir.exists():
            shutil.rmtree(output_dir)
        folder.replace(output_dir)
    return output_dir


def load_run(run: Path) -> tuple[SuperTransformer, PreTrainedTokenizerBase]:
    """The super-transformer and the tokenizer of a run folder."""
    supernet = SuperTransformer.from_pretrained(run)
    place = str(run) if (run / "tokenizer_config.json").exists() else str(supernet.base_name)
    return supernet, load_tokenizer(place)


def find_subnet(supernet: SuperTransformer, text: str, run: Path | None = None) -> Subnet:
    """The subnet a user names: `max`, `min`, a name of the palette, or JSON."""
    named = supernet.space.palette()
    if run is not None and (run / RESULTS_NAME).exists():
        rows = json.loads((run / RESULTS_NAME).read_text(encoding="utf-8"))["palette"]
        named |= {row["name"]: Subnet.from_dict(row["sizes"]) for row in rows}
    if text in named:
        return named[text]
    if not text.lstrip().startswith("{"):
        raise MLFSError(
            f"subnet {text!r}: expected one of {', '.join(named)}, or JSON such as {supernet.space.min.to_json()}"
        )
    subnet = Subnet.from_json(text)
    supernet.space.check(subnet)
    return subnet


def model_card(supernet: SuperTransformer, subnet: Subnet, small: PreTrainedModel) -> str:
    """README.md of an exported checkpoint."""
    count = sum(p.numel() for p in small.parameters())
    full = supernet.count_parameters(supernet.space.max)
    auto = "AutoModelForCausalLM" if small.can_generate() else "AutoModelForSequenceClassification"
    base = supernet.base_name or "an unnamed model"
    return f"""---
library_name: transformers
base_model: {base}
tags: [mlfs]
---

# {base}, {subnet}

A sub-network of {base}: {len(subnet.layers)} of {supernet.dimensions.layers} layers, hidden size {subnet.hidden},
{subnet.heads} heads, feed-forward size {subnet.ffn}; {count / 1e6:.1f} million of {full / 1e6:.1f} million parameters.
It was trained with mlfs (Multistage Low-rank Fine-tuning of Super-transformers, arXiv 2404.01353) and has its low-rank
updates merged. It is an ordinary transformers checkpoint:

```python
from transformers import {auto}, AutoTokenizer

model = {auto}.from_pretrained(".")
tokenizer = AutoTokenizer.from_pretrained(".")
```

Subnet: `{subnet.to_json()}`
"""


def save_data_arguments(run: Path, data: DataArguments, raw: RawData) -> None:
    """Records how the data was read, so that `mlfs eval` reads its like."""
    run.mkdir(parents=True, exist_ok=True)
    settings = asdict(data) | {"task": raw.task}
    write_json(run / DATA_NAME, {"arguments": settings, "id2label": raw.id2label})


def load_data_arguments(run: Path) -> tuple[DataArguments, dict[int, str] | None]:
    """What `save_data_arguments` recorded; defaults for a super-transformer that was saved by hand."""
    if not (run / DATA_NAME).exists():
        return DataArguments(), None
    try:
        state = json.loads((run / DATA_NAME).read_text(encoding="utf-8"))
        labels = {int(i): name for i, name in state["id2label"].items()}
        return DataArguments(**state["arguments"]), labels or None
    except (ValueError, KeyError, TypeError) as error:
        raise MLFSError(
            f"{run / DATA_NAME} is damaged ({error}): delete it and name the data on the command line"
        ) from None


class _readable:
    """Turns what transformers raises for a model that is not there into one line."""

    def __init__(self, what: str, name: str) -> None:
        self.what, self.name = what, name

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, (OSError, ValueError)) and not isinstance(error, MLFSError):
            first = next(iter(str(error).strip().splitlines()), type(error).__name__)
            raise MLFSError(f"no {self.what} {self.name!r}: {first} Give a Hub name or a folder") from None


def _flag(value: str) -> str | bool:
    return {"true": True, "false": False}.get(value.lower(), value)
