"""`FinishingTrainer`: one size of a super-transformer trains on alone, taught by the whole model."""

import copy
from typing import Any

import torch
from torch import nn
from transformers import Trainer

from mlfs.errors import MLFSError
from mlfs.space.subnet import Subnet
from mlfs.supernet.model import SuperTransformer
from mlfs.training.arguments import BY_SIZE, MLFSArguments
from mlfs.training.batch import Batch, accumulation_of
from mlfs.training.checks import not_finite
from mlfs.training.distillation import detached, distance_of
from mlfs.training.execution import without_dropout
from mlfs.training.inputs import without_labels
from mlfs.training.losses import SubnetLoss
from mlfs.training.task import task_of


class FinishingTrainer(Trainer):
    """Trains a copy of one size, a plain transformers model, with all of its weights. Its teacher is maxnet.

    The loss is that of a subnet in stages 1 and 2 (`distill_alpha`, `distill_beta`, `temperature`), without dropout.
    The super-transformer itself stays as it is.

    Args:
        supernet: trained; it is what teaches.
        subnet: the size to train; `small` is its copy.
        args: the learning rate is `base_learning_rate`; one pass unless `num_train_epochs` says more. What says how
            stages train is not read.
        **kwargs: of `transformers.Trainer`.

    Raises:
        MLFSError: `subnet` is not in the space.
    """

    args: MLFSArguments

    def __init__(
        self, supernet: SuperTransformer, subnet: Subnet, args: MLFSArguments | None = None, **kwargs: Any
    ) -> None:
        args = copy.copy(MLFSArguments() if args is None else args)
        args.learning_rate = args.base_learning_rate
        if args.num_train_epochs == BY_SIZE:
            args.num_train_epochs = 1.0
        self.small = supernet.extract(subnet).requires_grad_(True)
        super().__init__(model=self.small, args=args, **kwargs)
        task = task_of(self.small)
        if not task.divides_by_items:
            self.model_accepts_loss_kwargs = False
        self.supernet, self.subnet = supernet, subnet
        supernet.to(self.args.device)
        self.subnet_loss = SubnetLoss(task, distance_of(supernet, args), args.distill_alpha, args.temperature)
        self.layers = supernet.kept_layers(subnet)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Trains the copy, as `transformers.Trainer` does. The teacher's stages are merged meanwhile.

        Raises:
            MLFSError: a loss, or a weight that came of it, is NaN or infinite.
        """
        merged = self.supernet.merged_stages
        self.supernet.merge_stages(self.supernet.trained_stages)  # read once instead of added in each step
        try:
            output = super().train(*args, **kwargs)
        finally:
            self.supernet.merge_stages(merged)
        if faulty := not_finite(self.small.named_parameters()):
            raise MLFSError(f"the weight {faulty} became NaN or infinite: train with a lower learning rate")
        return output

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Computes the loss of a subnet while it trains, and the task's alone in evaluation."""
        if not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        without_dropout(model)
        needs_states = {"output_hidden_states": True} if self.subnet_loss.distance.is_used else {}
        given = without_labels(self.supernet.model, inputs, self.label_names)
        self.supernet.model.eval()
        with torch.no_grad(), self.accelerator.autocast(), self.supernet.activate(self.supernet.space.max):
            teacher = detached(self.supernet(**given, **needs_states))
        loss, outputs = super().compute_loss(model, {**inputs, **needs_states}, True, num_items_in_batch)
        labels = inputs.get("labels")
        task = task_of(self.supernet.model, labels)
        batch = Batch(inputs, accumulation_of(self, num_items_in_batch), task=task, unlabelled=task.unlabelled(inputs))
        found = self.subnet_loss(batch, self.layers, outputs, loss, teacher)
        if not torch.isfinite(found.loss):
            raise MLFSError(
                f"the loss became NaN or infinite at step {self.state.global_step + 1}: train with a lower learning "
                f"rate (now {self._get_learning_rate():.3g}), or check the data"
            )
        return (found.loss, outputs) if return_outputs else found.loss
