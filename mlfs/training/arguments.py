"""`MLFSArguments`: transformers' TrainingArguments plus what the method adds."""

import copy
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import TrainingArguments

from mlfs.errors import MLFSError
from mlfs.parsing import parse_json
from mlfs.supernet.depth import METHODS as LAYER_METHODS
from mlfs.training.execution import EXECUTIONS
from mlfs.training.refused import check_options
from mlfs.training.sampling import SAMPLINGS

BY_SIZE = -1.0  # as a number of passes: by the number of examples


def _option(default: Any, text: str) -> Any:
    """Makes a field with a default, copied for each instance, and its text of help."""
    return field(default_factory=lambda: copy.copy(default), metadata={"help": text})


def passes_over(examples: int | None) -> float:
    """Says how many passes over the data a stage takes by default.

    Few examples take many passes: of BERT on tasks of 2,500 to 8,500 examples, three leave some runs where they began
    and twenty none (Mosbach et al., arXiv 2006.04884).

    Args:
        examples: how many there are; None where nobody knows, as of a stream.
    """
    if not examples:
        return 3.0
    return float(min(max(math.ceil(30_000 / examples), 3), 20))


@dataclass
class MLFSArguments(TrainingArguments):
    """Holds all of `transformers.TrainingArguments`, and the method's own options.

    A list "per stage" has one value for every stage in `stages`, or a single one for all.
    """

    num_train_epochs: float = _option(
        BY_SIZE,
        "Passes over the data in each stage. -1: 3, or, of fewer than 10,000 examples, as many as see 30,000, at most "
        "20 (default: -1)",
    )
    learning_rate: float = _option(1e-3, "Learning rate of the optimizer; low-rank updates take a higher one than W.")
    stages_to_train: list[int] = _option(
        [0, 1, 2], "Stages to train, in order: 0 fine-tunes the full model, 1 adds widths, 2 adds depths."
    )
    stage_epochs: list[float] = _option([], "Epochs per stage (fractions count). Default: num_train_epochs each.")
    stage_steps: list[int] = _option([], "Optimizer steps per stage; overrides stage_epochs.")
    stage_learning_rates: list[float] = _option(
        [], "Learning rate per stage. Default: learning_rate in stage 0, subnet_rate_factor times it in 1 and 2."
    )
    subnet_rate_factor: float = _option(3.0, "How much higher the learning rate is in stages 1 and 2.")
    warmup_steps: float = _option(0.1, "Steps, or share of a stage's steps, in which the learning rate grows from 0.")
    dropout_stages: list[int] = _option(
        [0], "Stages that train with the model's dropout. Subnets have less to spare: 1 and 2 do better without."
    )
    rank: int = _option(8, "Rank of the low-rank stages.")
    lora_alpha: float = _option(16.0, "An update is scaled by lora_alpha / rank.")
    subnets_per_step: int = _option(4, "Subnets K that see each batch in stages 1 and 2; the first is the full model.")
    subnet_sampling: str = _option(
        "sandwich",
        "The other K - 1: 'sandwich' (the narrowest at a random depth, then by turns one that is as wide on every axis "
        "and one drawn axis by axis) or 'random' (each drawn axis by axis).",
    )
    subnet_draws: str = _option(
        "batch",
        "When subnets are drawn: for each 'batch' that a step accumulates (more sizes in an update), or once a 'step' "
        "(accumulated batches then give the update of one large batch).",
    )
    subnet_execution: str = _option(
        "sequential",
        "How the subnets of a step run: 'sequential', one after the other, or 'lockstep', all through each layer "
        "together (the same gradients; K times the activations; for GPUs).",
    )
    gamma: float = _option(
        0.5, "Gradient scaling: a subnet with n_j of maxnet's n_1 parameters weighs (n_1/n_j)^gamma."
    )
    gamma_normalization: str = _option(
        "weights", "Divide the weighted sum of losses by the sum of 'weights', by 'count' (K), or by 'none'."
    )
    distill_alpha: float = _option(0.9, "Share of the KL divergence from maxnet in a subnet's loss, 0 to 1.")
    distill_beta: list[float] = _option([0.1], "Weight of the hidden-state distance: one, or one per maxnet layer.")
    teacher: str = _option(
        "frozen",
        "Who teaches the sizes in stages 1 and 2: a 'frozen' copy of the whole model from before them, or 'maxnet' as "
        "it is in the same step, which costs nothing and stands lower learning rates (subnet_rate_factor 1).",
    )
    temperature: float = _option(1.0, "Temperature of the KL divergence.")
    projection_size: int = _option(64, "Numbers that hidden states are projected to before they are compared.")
    projection: str = _option(
        "fixed", "Projections: 'fixed' (random, orthonormal) or 'learned' (trained along with the stage)."
    )
    fused_head_loss: bool = _option(
        True,
        "Compute a language model's loss from what goes into its head, some rows at a time, instead of from logits of "
        "the whole batch. Not used with a loss of your own, or torch_compile.",
    )
    train_head: bool = _option(True, "Whether a new task head (classifier and the like) trains, in every stage.")
    train_norms: bool = _option(False, "Whether the weights of the norms train too, at base_learning_rate.")
    train_embeddings: bool | None = _option(
        None,
        "Whether the embeddings train too, at base_learning_rate, where not all weights do. The run folder then holds "
        "them. Default: yes, unless the model has a language model's head, or is rotated.",
    )
    train_base: list[int] = _option(
        [],
        "Stages in which all weights train instead of adapters: '0' for a fully fine-tuned teacher, '0 1 2' for all. "
        "The run folder then holds the whole model.",
    )
    base_learning_rate: float = _option(
        1e-4, "Learning rate of what trains of the base itself: beside adapters at most theirs."
    )
    order: str = _option(
        "gradient",
        "How units are ranked before they are first sliced: 'gradient', 'activation', 'magnitude' or 'none'; "
        "'rotation' (of Llama's kin) turns the residual stream to its principal axes, and ranks the rest by gradient.",
    )
    order_layers: str = _option(
        "auto",
        "Which layers a depth given by number keeps: by 'loss' or 'influence' (taken out one by one, the least missed "
        "first), or 'even' (spaced). 'auto': 'loss' for models that generate text, else 'even'.",
    )
    order_batches: int = _option(30, "Training batches the ranking is computed from; of layers the first 8.")
    merge_stages: bool = _option(
        True, "Merge frozen earlier stages into an fp32 copy of the base while a later one trains."
    )
    stop_ends: str = _option(
        "run",
        "What a callback ends that stops training, early stopping say: the 'run', or a 'stage', after which the next "
        "one begins.",
    )
    overwrite_run: bool = _option(False, "Start anew in an output_dir that holds a run: its stages are deleted.")
    palette: str | None = _option(
        None, "JSON object of name: subnet, shown at each evaluation. Default: max, min and two between."
    )

    def __post_init__(self) -> None:
        check_options(self)
        super().__post_init__()
        if not torch.cuda.is_available():
            self.dataloader_pin_memory = False  # pinning is for GPUs, and warns without one
        self._check_stages()
        self._check_ranges()
        self._check_choices()
        self._check_palette()

    def _check_stages(self) -> None:
        stages = self.stages_to_train
        if self.train_base is None or isinstance(self.train_base, bool):
            self.train_base = list(stages) if self.train_base else []
        if not isinstance(self.train_base, (list, tuple)):
            raise MLFSError(f"train_base={self.train_base!r}: expected a list of stages, such as [0], or True for all")
        if not stages or sorted(set(stages)) != list(stages) or not set(stages) <= {0, 1, 2}:
            raise MLFSError(f"stages_to_train={stages}: expected ascending stages out of 0, 1, 2")
        for name in ("stage_epochs", "stage_steps", "stage_learning_rates"):
            values = getattr(self, name)
            if len(values) not in (0, 1, len(stages)):
                raise MLFSError(f"{name}={values}: expected one value, or one for each of the stages {stages}")
            if any(value <= 0 for value in values):
                raise MLFSError(f"{name}={values}: expected positive values")
        if not set(self.train_base) <= set(stages):
            raise MLFSError(f"train_base={self.train_base}: expected some of the stages that train, {stages}")

    def _check_ranges(self) -> None:
        for name in ("rank", "subnets_per_step", "projection_size", "order_batches"):
            if getattr(self, name) < 1:
                raise MLFSError(f"{name}={getattr(self, name)}: expected >= 1")
        if self.gamma < 0:
            raise MLFSError(f"gamma={self.gamma}: expected >= 0")
        if not 0 <= self.distill_alpha <= 1:
            raise MLFSError(f"distill_alpha={self.distill_alpha}: expected 0 to 1")
        for name in ("subnet_rate_factor", "base_learning_rate", "temperature"):
            if getattr(self, name) <= 0:
                raise MLFSError(f"{name}={getattr(self, name)}: expected a positive number")
        if self.num_train_epochs < 0 and self.num_train_epochs != BY_SIZE:
            raise MLFSError(
                f"num_train_epochs={self.num_train_epochs}: expected 0 or more, or -1 for a default by size"
            )

    def _check_choices(self) -> None:
        choices: dict[str, Iterable[str]] = {
            "subnet_sampling": SAMPLINGS,
            "subnet_draws": ("batch", "step"),
            "subnet_execution": EXECUTIONS,
            "gamma_normalization": ("weights", "count", "none"),
            "stop_ends": ("run", "stage"),
            "projection": ("fixed", "learned"),
            "teacher": ("frozen", "maxnet"),
            "order_layers": LAYER_METHODS,
            "order": ("gradient", "activation", "magnitude", "rotation", "none"),
        }
        for name, known in choices.items():
            value = getattr(self, name)
            if value not in known:
                raise MLFSError(f"{name}={value!r}: expected one of {', '.join(known)}")
        for name in ("train_norms", "train_embeddings"):
            if self.order == "rotation" and getattr(self, name):
                raise MLFSError(
                    f"order='rotation' folds the weights of norms away, and unties heads from embeddings, which {name} "
                    "trains: take one of both"
                )

    def _check_palette(self) -> None:
        if self.palette is None:
            return
        named = parse_json(self.palette, "palette", "an object of name: subnet")
        if not isinstance(named, dict) or not named:
            raise MLFSError('palette: expected a JSON object, e.g. {"small": {"hidden": 256, ...}}')

    def of_stage(self, name: str, stage: int, default: Any) -> Any:
        """Returns the value of a per-stage list for `stage`; `default` if the list is empty."""
        values = getattr(self, name)
        if not values:
            return default
        if len(values) == 1:
            return values[0]
        return values[self.stages_to_train.index(stage)]
