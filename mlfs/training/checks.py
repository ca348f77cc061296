"""Checks options before data and model are loaded: what would fail minutes later fails at once, in one line."""

import contextlib
import dataclasses
import math
from collections.abc import Iterable, Iterator

from torch import Tensor
from transformers import Trainer
from transformers.integrations import get_reporting_integration_callbacks

from mlfs.errors import MLFSError
from mlfs.training.arguments import MLFSArguments

# What transformers, accelerate and PyTorch raise for options that do not fit each other, or this machine.
SETUP_ERRORS = (ArithmeticError, AttributeError, ImportError, LookupError, OSError, RuntimeError, TypeError, ValueError)
_LOWEST = {
    "per_device_train_batch_size": 1,
    "per_device_eval_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "dataloader_num_workers": 0,
    "learning_rate": 0,
    "seed": 0,
    "data_seed": 0,
}
_SEEDS = ("seed", "data_seed")  # NumPy takes 32 bits
_FINITE = (
    "learning_rate", "base_learning_rate", "subnet_rate_factor", "stage_learning_rates", "num_train_epochs",
    "stage_epochs", "weight_decay", "warmup_steps",
)  # fmt: skip


@contextlib.contextmanager
def setup_errors(what: str) -> Iterator[None]:
    """Says in one line, after `what`, which option does not fit; for blocks that only set things up."""
    try:
        yield
    except SETUP_ERRORS as error:
        raise MLFSError(f"{what}: {one_line(error)}") from error


def one_line(error: BaseException) -> str:
    """Returns what an exception says, in one line; its kind, if it says nothing."""
    text = " ".join(str(error).split())
    return text or type(error).__name__


def check_numbers(args: MLFSArguments) -> None:
    """Raises MLFSError for a number that nothing can be trained with, such as a batch of no examples."""
    for field in dataclasses.fields(args):
        value = getattr(args, field.name)
        for number in value if isinstance(value, list) else [value]:
            if not isinstance(number, (int, float)) or isinstance(number, bool):
                continue
            if math.isnan(number):
                raise MLFSError(f"{field.name} is nan: expected a number")
            if math.isinf(number) and field.name in _FINITE:
                raise MLFSError(f"{field.name} is {number}: expected a finite number")
            if field.name in _LOWEST and number < _LOWEST[field.name]:
                raise MLFSError(f"{field.name} is {number}: expected at least {_LOWEST[field.name]}")
            if field.name in _SEEDS and number >= 2**32:
                raise MLFSError(f"{field.name} is {number}: expected less than 2**32")


def not_finite(parameters: Iterable[tuple[str, Tensor]]) -> str | None:
    """Names the first of some parameters that holds NaN or infinity; None if none does."""
    return next((name for name, parameter in parameters if not parameter.detach().isfinite().all()), None)


def check_setup(args: MLFSArguments) -> None:
    """Raises MLFSError for numbers that nothing can be trained with, and for libraries that are not installed."""
    check_numbers(args)
    with setup_errors("report_to"):
        for callback in get_reporting_integration_callbacks(args.report_to):
            callback()
    if args.lr_scheduler_kwargs is not None and not isinstance(args.lr_scheduler_kwargs, dict):
        raise MLFSError(f"lr_scheduler_kwargs is {args.lr_scheduler_kwargs!r}: expected a JSON object")
    with setup_errors("optim"):
        Trainer.get_optimizer_cls_and_kwargs(args)
