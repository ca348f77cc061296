"""The command line: `mlfs train | eval | export | demo`."""

import argparse
import difflib
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mlfs import __version__
from mlfs.errors import MLFSError

DESCRIPTION = """Train one transformer once, deploy it at any size.

verbs:
  demo     the whole road on embedded data, in minutes, without a GPU or a download of data
  train    make a model a super-transformer and train it in three low-rank stages
  eval     score one size of a trained run
  export   write one size of a trained run as an ordinary transformers checkpoint

`mlfs VERB --help` explains a verb."""

TRAIN_DESCRIPTION = """Trains a super-transformer in three stages; prints what each size costs and scores.

  mlfs train --model minilm --train_file train.tsv --validation_file dev.tsv --output_dir runs/rte
  mlfs train examples/minilm_sst2.yaml --seed 1            options from a YAML file; flags override it
  mlfs train examples/minilm_sst2.yaml --resume_from_checkpoint true

The run folder holds the stages (a few megabytes; not the base), results.json and the log."""

# Of transformers' own options, those most people need; --help-all shows the rest.
COMMON = frozenset(
    [
        "output_dir",
        "seed",
        "learning_rate",
        "num_train_epochs",
        "max_steps",
        "per_device_train_batch_size",
        "per_device_eval_batch_size",
        "gradient_accumulation_steps",
        "weight_decay",
        "warmup_steps",
        "lr_scheduler_type",
        "logging_steps",
        "eval_strategy",
        "eval_steps",
        "save_strategy",
        "save_steps",
        "save_total_limit",
        "load_best_model_at_end",
        "metric_for_best_model",
        "bf16",
        "report_to",
        "resume_from_checkpoint",
        "dataloader_num_workers",
    ]
)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a verb; returns the exit status: 0, or 2 after an error the user can put right."""
    words = list(sys.argv[1:] if argv is None else argv)
    verbs = {"train": _train, "eval": _eval, "export": _export, "demo": _demo}
    parser = argparse.ArgumentParser(
        "mlfs",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="mlfs VERB [options]",
    )
    parser.add_argument("--version", action="version", version=f"mlfs {__version__}")
    parser.add_argument("verb", choices=list(verbs), metavar="VERB", help=", ".join(verbs))
    if not words:
        parser.print_help()
        return 0
    verb = parser.parse_args(words[:1]).verb
    # Before transformers is imported: nothing here needs its warnings about optional parts.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        verbs[verb](words[1:])
    except MLFSError as error:
        print(f"mlfs {verb}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(
            f"\nmlfs {verb}: interrupted; `--resume_from_checkpoint true` goes on from the last checkpoint",
            file=sys.stderr,
        )
        return 130
    return 0


def _train(words: list[str]) -> None:
    from mlfs.commands.train import train

    train(*train_arguments(words))


def train_arguments(words: list[str]) -> tuple[Any, Any, Any]:
    """Model, data and training arguments from flags and, before them, a YAML file."""
    from transformers import HfArgumentParser

    from mlfs.commands.bases import ModelArguments
    from mlfs.data.arguments import DataArguments
    from mlfs.training.arguments import MLFSArguments

    kinds: Any = (ModelArguments, DataArguments, MLFSArguments)
    parser = HfArgumentParser(
        kinds, prog="mlfs train", description=TRAIN_DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="mlfs train [FILE.yaml] --model MODEL --output_dir RUN [options]", allow_abbrev=False,
    )  # fmt: skip
    parser.add_argument("--help-all", action="store_true", help="show transformers' TrainingArguments too")
    if "--help" in words or "-h" in words or "--help-all" in words:
        if "--help-all" not in words:
            _hide_rare(parser, MLFSArguments)
        parser.print_help()
        raise SystemExit(0)
    if words and words[0].endswith((".yaml", ".yml", ".json")):
        words = _words_of_file(Path(words[0]), parser) + words[1:]
    known = {option for action in parser._actions for option in action.option_strings}
    for word in words:
        if word.startswith("--") and word.partition("=")[0] not in known:
            raise MLFSError(f"unknown option {word.partition('=')[0]}{_nearest(word[2:].partition('=')[0], known)}")
    given = {word.partition("=")[0] for word in words}
    for name, value in (("--eval_strategy", "epoch"), ("--report_to", "none"), ("--logging_steps", "50")):
        if name not in given:
            words = [name, value, *words]
    namespace = parser.parse_args(words)
    values = {k: v for k, v in vars(namespace).items() if k != "help_all"}
    if not values["output_dir"]:
        raise MLFSError("give --output_dir, the folder the run is written to")
    return parser.parse_dict(values, allow_extra_keys=False)  # type: ignore[return-value]


def _eval(words: list[str]) -> None:
    parser = argparse.ArgumentParser(
        "mlfs eval", description="Scores one size of a run and prints one JSON object: sizes, parameters, bytes, "
        "latency (seconds a batch) and the task's metrics."
    )  # fmt: skip
    parser.add_argument("run", type=Path, help="the run folder, or a stage of it (RUN/stage-0)")
    parser.add_argument(
        "--subnet", default="max", help="max, min, a name from the run's palette, or JSON (default: max)"
    )
    parser.add_argument("--validation_file", help="validation data (default: the run's)")
    parser.add_argument("--dataset_name", help="or a data set of the Hub")
    parser.add_argument("--dataset_config_name", help="its configuration, such as sst2")
    parser.add_argument("--validation_split", help="its split")
    parser.add_argument("--max_seq_length", type=int, help="cut texts to this many tokens (default: as in training)")
    parser.add_argument("--max_eval_samples", type=int, help="score on this many examples (default: all)")
    parser.add_argument("--batch_size", type=int, default=32, help="examples in a batch (default: 32)")
    given = parser.parse_args(words)
    from transformers.utils import logging

    from mlfs.commands.evaluate import evaluate
    from mlfs.data.arguments import DataArguments

    logging.set_verbosity_error()
    names = ("validation_file", "dataset_name", "dataset_config_name", "validation_split", "max_seq_length",
             "max_eval_samples")  # fmt: skip
    options = {name: value for name in names if (value := getattr(given, name)) is not None}
    data = DataArguments(**options) if options else None
    print(json.dumps(evaluate(given.run, given.subnet, data, given.batch_size)))


def _export(words: list[str]) -> None:
    parser = argparse.ArgumentParser(
        "mlfs export", description="Writes one size of a run as a transformers checkpoint that loads without mlfs: "
        "weights in safetensors, configuration, tokenizer and model card."
    )  # fmt: skip
    parser.add_argument("run", type=Path, help="the run folder, or a stage of it")
    parser.add_argument(
        "--subnet", default="max", help="max, min, a name from the run's palette, or JSON (default: max)"
    )
    parser.add_argument("--format", choices=["hf"], default="hf", help="hf: a transformers checkpoint (default)")
    parser.add_argument("--output_dir", type=Path, required=True, help="folder to write; must be new or empty")
    parser.add_argument("--overwrite", action="store_true", help="replace what is in the folder")
    given = parser.parse_args(words)
    from mlfs.commands.export import export

    print(export(given.run, given.subnet, given.output_dir, given.overwrite))


def _demo(words: list[str]) -> None:
    parser = argparse.ArgumentParser(
        "mlfs demo", formatter_class=argparse.RawDescriptionHelpFormatter,
        description="The whole road on embedded data: a MiniLM encoder learns to tell Python packages apart by their\n"
        "documentation, at every size of a palette; then one size is exported and loaded again.\n\n"
        "--decoder: SmolLM2-135M is sliced to about two thirds and trained on from the slice and, for\n"
        "comparison, from a random start, on the standard library's source.",
    )  # fmt: skip
    parser.add_argument("--decoder", action="store_true", help="the decoder's road")
    parser.add_argument("--output_dir", type=Path, help="folder of the run (default: runs/demo or runs/demo-decoder)")
    parser.add_argument("--seed", type=int, default=0, help="of everything drawn at random (default: 0)")
    parser.add_argument("--steps", type=int, help="optimizer steps (default: what takes some minutes on two cores)")
    given = parser.parse_args(words)
    from mlfs.commands import demo

    folder = given.output_dir or Path("runs", "demo-decoder" if given.decoder else "demo")
    (demo.decoder if given.decoder else demo.encoder)(folder, given.seed, given.steps)


def _words_of_file(path: Path, parser: argparse.ArgumentParser) -> list[str]:
    """The options of a YAML file as words of a command line."""
    import yaml

    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise MLFSError(f"{path}: {error.strerror}") from None
    except yaml.YAMLError as error:
        raise MLFSError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise MLFSError(f"{path}: expected a mapping of options to values")
    known = {option[2:] for action in parser._actions for option in action.option_strings if option.startswith("--")}
    words: list[str] = []
    for key, value in values.items():
        if key not in known:
            raise MLFSError(f"{path}: unknown option {key!r}{_nearest(str(key), known)}")
        if value is None:
            continue
        if isinstance(value, dict) or key in ("space", "palette"):
            words += [f"--{key}", value if isinstance(value, str) else json.dumps(value)]
        elif isinstance(value, list):
            words += [f"--{key}", *map(str, value)]
        else:
            words += [f"--{key}", str(value)]
    return words


def _nearest(name: str, known: set[str]) -> str:
    near = difflib.get_close_matches(name, [k.removeprefix("--") for k in known], n=1)
    return f"; did you mean {near[0]}?" if near else "; `mlfs train --help-all` lists all options"


def _hide_rare(parser: argparse.ArgumentParser, kind: type) -> None:
    from transformers import TrainingArguments

    rare = {f.name for f in TrainingArguments.__dataclass_fields__.values()} - COMMON
    for action in parser._actions:
        if action.dest in rare or (action.dest.startswith("no_") and action.dest not in kind.__annotations__):
            action.help = argparse.SUPPRESS


if __name__ == "__main__":
    raise SystemExit(main())
