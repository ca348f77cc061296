"""`DataArguments` on the command line, and which values it refuses."""

import pytest
from transformers import HfArgumentParser

from mlfs.data.arguments import DataArguments
from tests.helpers.data import one_line_error


def test_arguments_come_from_the_command_line_with_help_for_each(capsys):
    parser = HfArgumentParser(DataArguments)
    (args,) = parser.parse_args_into_dataclasses(
        ["--train_file", "a.csv", "--max_seq_length", "128", "--task", "regression"]
    )
    assert args == DataArguments(train_file="a.csv", max_seq_length=128, task="regression")
    assert parser.parse_dict({"block_size": 64})[0].block_size == 64
    with pytest.raises(SystemExit):
        parser.parse_args(["--help"])
    text = capsys.readouterr().out
    for field in DataArguments.__dataclass_fields__.values():
        assert f"--{field.name}" in text and field.metadata["help"]


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"task": "translation"}, "one of auto, classification, regression, causal-lm"),
        ({"documents": "page"}, "one of auto, line, file"),
        ({"max_train_samples": 0}, "--max_train_samples is 0"),
        ({"block_size": -1}, "--block_size is -1"),
        ({"validation_fraction": 1.0}, "--validation_fraction is 1.0"),
    ],
)
def test_argument_out_of_range_is_a_one_line_error(options, part):
    one_line_error(lambda: DataArguments(**options), part)
