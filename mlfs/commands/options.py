"""The options of `mlfs train`: from flags and a YAML file, read and checked by jsonargparse."""

import argparse
import dataclasses
import difflib
import json
import re
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from mlfs.errors import MLFSError
from mlfs.parsing import MAX_DEPTH, parse_yaml

DESCRIPTION = """Trains a super-transformer in three stages; prints what each size costs and scores.

  mlfs train --model minilm --train_file train.tsv --validation_file dev.tsv --output_dir runs/rte
  mlfs train examples/minilm_sst2.yaml --seed 1            options from a YAML file; flags override it
  mlfs train examples/minilm_sst2.yaml --resume_from_checkpoint true

The run folder holds the stages (a few megabytes; not the base), results.json and the log."""
USAGE = "mlfs train [FILE.yaml] --model MODEL --output_dir RUN [options]"

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
# Of the method's own options, those that few people need.
RARE = {
    "fused_head_loss", "gamma_normalization", "merge_stages", "order_batches", "projection", "projection_size",
    "stop_ends", "subnet_draws", "temperature",
}  # fmt: skip
DEFAULTS = {"eval_strategy": "epoch", "report_to": "none", "logging_steps": 50}  # instead of transformers'
GROUPS = {"ModelArguments": "Model and sizes", "DataArguments": "Data", "MLFSArguments": "Method"}
RENAMED = {"fold_stages": "merge_stages"}
TRUTH = {
    **dict.fromkeys(("true", "yes", "on", "t", "y", "1"), True),
    **dict.fromkeys(("false", "no", "off", "f", "n", "0"), False),
}
NUMBERS = {"nan": ".nan", "inf": ".inf", "+inf": ".inf", "-inf": "-.inf", "infinity": ".inf", "-infinity": "-.inf"}


def train_arguments(words: list[str]) -> tuple[Any, Any, Any]:
    """Reads the options of `mlfs train`.

    Args:
        words: flags (`--name value`, `--name=value`; values of a list stand side by side or in brackets), and before
            them, if wanted, a YAML file of `name: value`. A flag overrides the file.

    Returns:
        ModelArguments, DataArguments and MLFSArguments.

    Raises:
        MLFSError: an option that does not exist, or a value of another type than the option's.
        SystemExit: after `--help` or `--help-all` has been answered.
    """
    from mlfs.commands.bases import ModelArguments
    from mlfs.data.arguments import DataArguments
    from mlfs.training.arguments import MLFSArguments
    from mlfs.training.checks import SETUP_ERRORS, one_line

    kinds = (ModelArguments, DataArguments, MLFSArguments)
    types = {name: hint for kind in kinds for name, hint in _types(kind).items()}
    if {"--help", "-h", "--help-all"} & set(words):
        _parser(kinds, types, all_options="--help-all" in words).print_help()
        raise SystemExit(0)
    file: dict[str, Any] = {}
    if words and words[0].endswith((".yaml", ".yml", ".json")):
        file, words = read_file(Path(words[0]), types), words[1:]
    flags = read_flags(words, types)
    # Text is taken as it stands. The parser reads YAML, to which `#1 String` is nothing and `&x` a mark.
    texts = {name: value for given in (file, flags) for name, value in given.items() if _is_text(name, value, types)}
    values = _parse(
        _parser(kinds, types),
        {name: value for name, value in file.items() if name not in texts},
        [f"--{name}={_in_yaml(value)}" for name, value in flags.items() if name not in texts],
    )
    values = {name: _as_declared(value, types[name]) for name, value in values.items() if value is not None} | texts
    if not values.get("model"):
        raise MLFSError("give --model, a name on the Hub or a folder")
    if not values.get("output_dir"):
        raise MLFSError("give --output_dir, the folder the run is written to")
    try:
        made = [
            kind(**{f.name: values[f.name] for f in dataclasses.fields(kind) if f.name in values}) for kind in kinds
        ]
    except (RecursionError, *SETUP_ERRORS) as error:  # transformers' own checks
        where = "the options cannot be used here: " if isinstance(error, (ImportError, OSError)) else ""
        raise MLFSError(where + one_line(error)) from None
    model, data, args = made
    model.search_space()  # type: ignore[union-attr]  # asked before data and model are loaded
    return model, data, args


def read_file(path: Path, types: dict[str, Any]) -> dict[str, Any]:
    """Reads a YAML file of options; raises MLFSError unless it is a mapping of names in `types` to values."""
    try:
        values = parse_yaml(path.read_bytes(), str(path))
    except OSError as error:
        raise MLFSError(f"{path}: {error.strerror}") from None
    if not isinstance(values, dict):
        raise MLFSError(f"{path}: expected a mapping of options to values")
    found = {}
    for key, value in values.items():
        name = str(key).replace("-", "_")
        if name not in types:
            raise MLFSError(f"{path}: unknown option {key!r}{_nearest(str(key), types)}")
        if name in found:
            raise MLFSError(f"{path} gives {name!r} twice, once with dashes: keep one")
        if value is not None:  # a name without a value says nothing
            found[name] = _in_a_file(value, types[name])
    return found


def _in_a_file(value: Any, hint: Any) -> Any:
    """Brings a value of a YAML file closer to the option's type: numbers, dates and mappings to text, 0 to false."""
    members = _members(hint)
    if bool in members and isinstance(value, (int, str)):
        return TRUTH.get(str(value).lower(), value)
    if float in members and isinstance(value, str) and value.lower() in NUMBERS:
        return float(value)
    if str in members and isinstance(value, dict):
        return json.dumps(value, default=str)
    if list[str] in members and isinstance(value, list):
        return [item if isinstance(item, str) else str(item) for item in value]
    if (str in members or list[str] in members) and not isinstance(value, (list, str, dict)):
        return str(value)
    return value


def read_flags(words: list[str], types: dict[str, Any]) -> dict[str, Any]:
    """Reads flags by name: text, truth values, or a list of text where values stand side by side.

    A truth value may stand alone (`--bf16`) or be denied (`--no_train_head`), and dashes may stand for underscores.

    >>> types = {"steps": list[int], "bf16": bool, "fused": bool, "name": str}
    >>> read_flags(["--steps", "10", "5", "--bf16", "--no-fused", "--name", "#1"], types)
    {'steps': ['10', '5'], 'bf16': True, 'fused': False, 'name': '#1'}
    """
    flags: list[tuple[str, list[str]]] = []
    for word in words:
        if word.startswith("--"):
            option, equals, value = word.partition("=")
            flags.append((option, [value] if equals else []))
        elif flags:
            flags[-1][1].append(word)
        else:
            raise MLFSError(f"unexpected {word!r}: options start with --; a file of options ends in .yaml")
    return dict(_read_flag(option, values, types) for option, values in flags)


def _read_flag(option: str, values: list[str], types: dict[str, Any]) -> tuple[str, Any]:
    name = option[2:].replace("-", "_")
    positive = name.removeprefix("no_")
    if name not in types and positive in types and bool in _members(types[positive]) and not values:
        return positive, False
    if name not in types:
        raise MLFSError(f"unknown option {option}{_nearest(name, types)}")
    members = _members(types[name])
    if len(values) > 1 and not _is_list(types[name]):
        raise MLFSError(f"{option} takes one value, not {len(values)}: {' '.join(values)}")
    if len(values) > 1:
        return name, values
    if not values and bool not in members:
        raise MLFSError(f"{option} needs a value")
    if not values:
        return name, True
    if bool in members:
        return name, TRUTH.get(values[0].lower(), values[0])
    if list[str] in members and str not in members and not values[0].startswith("["):
        return name, values
    return name, values[0]


def _is_text(name: str, value: Any, types: dict[str, Any]) -> bool:
    """Tells whether an option's value is text, or a list of it, that needs no more reading."""
    members = _members(types[name])
    if isinstance(value, list):
        return list[str] in members
    return isinstance(value, str) and str in members and bool not in members


def _in_yaml(value: Any) -> str:
    """Writes a flag's value as the parser reads it: lists in brackets; YAML has words of its own for nan and inf."""
    if isinstance(value, list):
        return f"[{', '.join(_in_yaml(item) for item in value)}]"
    if isinstance(value, bool):
        return str(value).lower()
    if value.count("[") + value.count("{") > MAX_DEPTH:  # the parser's C code crashes on 100,000
        raise MLFSError(f"a value that begins with {value[:20]!r} is nested too deep: it is not what is expected here")
    return NUMBERS.get(value.lower(), value)


def _parser(kinds: tuple[type, ...], types: dict[str, Any], all_options: bool = True) -> Any:
    """The parser of all fields of `kinds`; unless `all_options`, its help leaves out the rarer ones."""
    from jsonargparse import ArgumentParser
    from transformers import TrainingArguments

    rare = set() if all_options else {field.name for field in dataclasses.fields(TrainingArguments)} - COMMON | RARE
    parser = ArgumentParser(
        prog="mlfs train", usage=USAGE, description=DESCRIPTION, exit_on_error=False,
        formatter_class=argparse.RawDescriptionHelpFormatter, add_help=False,
    )  # fmt: skip
    groups = {title: parser.add_argument_group(title) for title in (*GROUPS.values(), "Training, from transformers")}
    for kind in kinds:
        for field in dataclasses.fields(kind):
            if field.name in types:
                hint, own = types[field.name], field.name in kind.__annotations__
                title = GROUPS[kind.__name__] if own else "Training, from transformers"
                groups[title].add_argument(
                    f"--{field.name}",
                    type=_accepted(hint),
                    default=DEFAULTS.get(field.name),
                    metavar=_metavar(hint, field.metadata.get("choices")),
                    help=argparse.SUPPRESS if field.name in rare else _help(field),
                )
    group = parser.add_argument_group("Help")
    group.add_argument("--help", action="store_true", help="show the options that most people need")
    group.add_argument("--help-all", action="store_true", help="show the rarer ones, too")
    for action in parser._actions:  # what jsonargparse adds by itself, and `read_flags` does not let through
        action.option_strings = [option for option in action.option_strings if not option.endswith("+")]
        if action.dest.endswith(".help") or any("." in option for option in action.option_strings):
            action.help = argparse.SUPPRESS
    return parser


def _parse(parser: Any, file: dict[str, Any], words: list[str]) -> dict[str, Any]:
    """What the file says, and over it the flags."""
    from jsonargparse import ArgumentError

    try:
        values = parser.parse_object(file)
        values.update(parser.parse_args(words, defaults=False))
    except ArgumentError as error:
        raise MLFSError(_in_one_line(str(error), parser)) from None
    return {name: value for name, value in values.as_dict().items() if not name.startswith("help")}


def _in_one_line(message: str, parser: Any) -> str:
    """What jsonargparse says of a value of the wrong type, without its list of all types that were tried."""
    key, value = re.search(r'key "(\w+)"', message), re.search(r"(?:Got|Given) value: (.*)", message)
    if key is None or value is None:
        return " ".join(message.split())
    action = next(action for action in parser._actions if action.dest == key[1])
    return f"{key[1]}={value[1]}: expected {action.metavar.lower()}"


def _types(kind: type) -> dict[str, Any]:
    """The type of each option, by name."""
    hints = get_type_hints(kind)
    return {field.name: hints[field.name] for field in dataclasses.fields(kind) if field.init}


def _members(hint: Any) -> tuple[Any, ...]:
    """The types of a union, without None; of another type itself."""
    union = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    return tuple(member for member in union if member is not type(None))


def _is_list(hint: Any) -> bool:
    return any(get_origin(member) is list for member in _members(hint))


def _accepted(hint: Any) -> Any:
    """The type that is read for an option of type `hint`: also nothing, and one value for a list."""
    hint = hint | None
    for member in _members(hint):
        if get_origin(member) is list:
            hint = hint | get_args(member)[0]
    return hint


def _as_declared(value: Any, hint: Any) -> Any:
    """The value of an option in its own type: of a list that has one value, the list."""
    if _is_list(hint) and str not in _members(hint) and not isinstance(value, list):
        return [value]
    return value


def _help(field: dataclasses.Field) -> str:
    """The text of an option, with its default where the text does not name one."""
    text = field.metadata.get("help", "")
    default = DEFAULTS.get(field.name, field.default)
    if field.default_factory is not dataclasses.MISSING:
        default = field.default_factory()
    if "default" in text.lower() or default in (None, "", [], dataclasses.MISSING):
        return text
    if isinstance(default, list):
        default = " ".join(map(str, default))
    return f"{text} (default: {str(default).lower() if isinstance(default, bool) else default})"


def _metavar(hint: Any, choices: list[str] | None) -> str:
    """How the help shows the values of an option."""
    words = {bool: "true|false", int: "INTEGER", float: "NUMBER", str: "TEXT"}
    members = _members(hint)
    if choices:
        return "|".join(choices)
    if str in members:
        return "TEXT"
    if _is_list(hint):
        return f"{words.get(get_args(members[0])[0], 'VALUE')} ..."
    return words.get(members[0], "VALUE")


def _nearest(name: str, known: Any) -> str:
    if name in RENAMED:
        return f"; its name is {RENAMED[name]} now"
    near = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {near[0]}?" if near else "; `mlfs train --help-all` lists all options"
