"""What Trainer takes and a super-transformer cannot do: refused at once, with the way out."""

from typing import Any

from mlfs.errors import MLFSError

_SHARDED = (
    "a subnet reads slices of whole weights, and these would be in pieces; with several GPUs start one process for "
    "each with `accelerate launch`"
)
_BY_HAND = "after training upload the run's folder with `hf upload`, or export a size and push that model"
OPTIONS = {
    "fsdp": _SHARDED,
    "deepspeed": _SHARDED,
    "parallelism_config": _SHARDED,
    "use_liger_kernel": "its kernels would take the place of elastic layers; those have kernels of their own",
    "push_to_hub": f"a checkpoint there would be no model that transformers loads; {_BY_HAND}",
}
OPTIMIZERS = {
    "galore": "it projects gradients of whole weights, and low-rank stages train; take adamw_torch or the like",
    "apollo": "it projects gradients of whole weights, and low-rank stages train; take adamw_torch or the like",
    "lomo": "it updates weights during the backward pass, before all subnets have added their gradients",
    "adalomo": "it updates weights during the backward pass, before all subnets have added their gradients",
}
ARGUMENTS = {
    "optimizers": "every stage makes its own: use the options of MLFSArguments, or optimizer_cls_and_kwargs",
    "model_init": "stages go on with one model: make it before, and train once per setting",
}
METHODS = {
    "hyperparameter_search": "run `mlfs train` once per setting",
    "push_to_hub": _BY_HAND,
}


def check_options(args: Any) -> None:
    """Raises MLFSError if a TrainingArguments asks for what no super-transformer can do."""
    for name, reason in OPTIONS.items():
        if value := getattr(args, name):
            raise MLFSError(f"{name}={value!r} is not supported: {reason}")
    name = str(getattr(args.optim, "value", args.optim))
    if reason := OPTIMIZERS.get(name.partition("_")[0], ""):
        raise MLFSError(f"optim={name} is not supported: {reason}")


def check_arguments(given: dict[str, Any]) -> None:
    """Raises MLFSError if arguments of a Trainer are given that the stages cannot take."""
    for name, reason in ARGUMENTS.items():
        if given.get(name) not in (None, (None, None)):
            raise MLFSError(f"{name} cannot be given: {reason}")


def refuse(method: str) -> MLFSError:
    """Makes the error of a method of Trainer that is not supported."""
    return MLFSError(f"{method} is not supported: {METHODS[method]}")
