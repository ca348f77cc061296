"""The command line: `mlfs train | eval | export | finish | demo | env`."""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from mlfs import __version__
from mlfs.commands.options import train_arguments
from mlfs.errors import MLFSError

__all__ = ["main", "train_arguments"]

DESCRIPTION = """Train one transformer once, deploy it at any size.

verbs:
  demo     the whole road on embedded data, in minutes, without a GPU or a download of data
  train    make a model a super-transformer and train it in three low-rank stages
  eval     score one size of a trained run
  export   write one size of a trained run as an ordinary transformers checkpoint
  finish   train one size of a run on alone, and write it as export does
  env      show what is active on this machine, and why: versions, backends, processors

`mlfs VERB --help` explains a verb."""


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, as all errors here."""

    def error(self, message: str) -> NoReturn:
        raise MLFSError(f"{message}; see `{self.prog} --help`")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a verb; returns the exit status: 0, or 2 after an error the user can put right."""
    words = list(sys.argv[1:] if argv is None else argv)
    # Before transformers is imported: nothing here needs its warnings about optional parts.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    name = "mlfs"
    try:
        verb = _verb(words[:1])
        if verb is None:
            return 0
        name = f"mlfs {verb}"
        VERBS[verb](words[1:])
    except MLFSError as error:
        print(f"{name}: error: {error}", file=sys.stderr)
        return 2
    except OSError as error:  # of the system, not of mlfs: a full disk, a name that is too long
        print(f"{name}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(
            f"\n{name}: interrupted; `--resume_from_checkpoint true` goes on from the last checkpoint",
            file=sys.stderr,
        )
        return 130
    return 0


def _verb(words: list[str]) -> str | None:
    """Reads the verb; without one it prints the help and returns None."""
    parser = _Parser(
        "mlfs",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="mlfs VERB [options]",
    )
    parser.add_argument("--version", action="version", version=f"mlfs {__version__}")
    parser.add_argument("verb", choices=list(VERBS), metavar="VERB", help=", ".join(VERBS))
    if not words:
        parser.print_help()
        return None
    return parser.parse_args(words).verb


def _train(words: list[str]) -> None:
    from mlfs.commands.train import train

    train(*train_arguments(words))


def _eval(words: list[str]) -> None:
    parser = _Parser(
        "mlfs eval", description="Scores one size of a run and prints one JSON object: sizes, parameters, bytes, "
        "latency (seconds a batch) and the task's metrics."
    )  # fmt: skip
    parser.add_argument("run", type=Path, help="the run folder, or a stage of it (RUN/stage-0)")
    parser.add_argument(
        "--subnet", default="max", help="max, min, a name or sizes from the run's table, or JSON (default: max)"
    )
    _add_model(parser)
    _add_data(parser)
    parser.add_argument("--validation_split", help="its split")
    parser.add_argument("--max_seq_length", type=int, help="cut texts to this many tokens (default: as in training)")
    parser.add_argument("--max_eval_samples", type=int, help="score on this many examples (default: all)")
    given = parser.parse_args(words)
    from transformers.utils import logging

    from mlfs.commands.evaluate import evaluate
    from mlfs.data.arguments import DataArguments

    logging.set_verbosity_error()
    options = _given(given, "validation_file", "dataset_name", "dataset_config_name", "validation_split",
                     "max_seq_length", "max_eval_samples")  # fmt: skip
    data = DataArguments(**options) if options else None
    print(json.dumps(evaluate(given.run, given.subnet, data, given.batch_size, given.model)))


def _export(words: list[str]) -> None:
    parser = _Parser(
        "mlfs export", description="Writes one size of a run as a transformers checkpoint that loads without mlfs: "
        "weights in safetensors, configuration, tokenizer and model card."
    )  # fmt: skip
    parser.add_argument("run", type=Path, help="the run folder, or a stage of it")
    parser.add_argument(
        "--subnet", default="max", help="max, min, a name or sizes from the run's table, or JSON (default: max)"
    )
    _add_model(parser)
    parser.add_argument("--format", choices=["hf"], default="hf", help="hf: a transformers checkpoint (default)")
    _add_target(parser)
    given = parser.parse_args(words)
    from mlfs.commands.export import export

    print(export(given.run, given.subnet, given.output_dir, given.overwrite, given.model))


def _finish(words: list[str]) -> None:
    parser = _Parser(
        "mlfs finish", description="Trains one size of a run on alone, with all of its weights and the whole model as "
        "its teacher, and writes it as a transformers checkpoint that loads without mlfs. The run stays as it is. "
        "Prints one JSON object: what the size scored before and after."
    )  # fmt: skip
    parser.add_argument("run", type=Path, help="the run folder, or a stage of it")
    parser.add_argument("--subnet", required=True, help="max, min, a name or sizes from the run's table, or JSON")
    _add_target(parser)
    _add_model(parser)
    parser.add_argument("--train_file", help="training data (default: the run's)")
    _add_data(parser)
    parser.add_argument("--max_train_samples", type=int, help="train on this many examples (default: as in training)")
    parser.add_argument("--num_train_epochs", type=float, default=1.0, help="passes over the data (default: 1)")
    parser.add_argument("--max_steps", type=int, default=-1, help="steps, instead of passes")
    parser.add_argument("--learning_rate", type=float, default=1e-4, help="of all weights (default: 1e-4)")
    parser.add_argument("--seed", type=int, default=42, help="of the order of the data (default: 42)")
    given = parser.parse_args(words)
    from mlfs.commands.finish import finish
    from mlfs.data.arguments import DataArguments

    data = DataArguments(**_given(given, "train_file", "validation_file", "dataset_name", "dataset_config_name",
                                  "max_train_samples"))  # fmt: skip
    found = finish(
        given.run, given.subnet, given.output_dir, given.overwrite, given.model, data,
        base_learning_rate=given.learning_rate, num_train_epochs=given.num_train_epochs, max_steps=given.max_steps,
        per_device_train_batch_size=given.batch_size, per_device_eval_batch_size=given.batch_size, seed=given.seed,
    )  # fmt: skip
    if found is not None:
        print(json.dumps(found))


def _given(values: argparse.Namespace, *names: str) -> dict[str, Any]:
    """Collects the options that were given."""
    return {name: value for name in names if (value := getattr(values, name)) is not None}


def _add_target(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output_dir", type=Path, required=True, help="folder to write: new or empty, outside of runs")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier export in the folder")


def _add_data(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--validation_file", help="validation data (default: the run's)")
    parser.add_argument("--dataset_name", help="or a data set of the Hub")
    parser.add_argument("--dataset_config_name", help="its configuration, such as sst2")
    parser.add_argument("--batch_size", type=int, default=32, help="examples in a batch (default: 32)")


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", help="the base, a Hub name or a folder (default: where it was in training)")


def _demo(words: list[str]) -> None:
    parser = _Parser(
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


def _env(words: list[str]) -> None:
    parser = _Parser("mlfs env", description="Shows what is active on this machine, and why: to read, and for reports.")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    given = parser.parse_args(words)
    from mlfs.commands.environment import show

    print(show(given.json))


VERBS = {"train": _train, "eval": _eval, "export": _export, "finish": _finish, "demo": _demo, "env": _env}

if __name__ == "__main__":
    raise SystemExit(main())
