"""One training step of a super-transformer: K subnets on one batch, each learning from maxnet (arXiv 2404.01353)."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate.utils.memory import clear_device_cache
from torch import Tensor, nn
from transformers import Trainer
from transformers.trainer_pt_utils import LabelSmoother

from mlfs.elastic.linear import ElasticLinear
from mlfs.elastic.norm import ElasticLayerNorm
from mlfs.errors import MLFSError
from mlfs.models.fused.lm_head import vocabulary_head
from mlfs.space.subnet import Subnet
from mlfs.supernet.model import SuperTransformer
from mlfs.training.arguments import MLFSArguments
from mlfs.training.batch import Accumulation, Batch, accumulation_of
from mlfs.training.distillation import distance_of
from mlfs.training.distributed import average_gradients, without_sync
from mlfs.training.evaluation import PaletteTrainer
from mlfs.training.execution import EXECUTIONS, Execution, one_by_one, without_dropout
from mlfs.training.losses import LossOfSubnet, SubnetLoss
from mlfs.training.means import RunningMeans
from mlfs.training.runs import last_checkpoint
from mlfs.training.sampling import SAMPLINGS, BatchCounter, generator_of, narrowest
from mlfs.training.task import Task, is_a_number_per_label, task_of
from mlfs.training.teacher import FrozenTeacher


class SubnetTrainer(PaletteTrainer):
    """A Trainer whose steps train several subnets. Which stage trains, and what is saved, is for `MLFSTrainer`.

    Args:
        supernet: what trains.
        args: the options.
        **kwargs: of `transformers.Trainer`.
    """

    def __init__(self, supernet: SuperTransformer, args: MLFSArguments, **kwargs: Any) -> None:
        super().__init__(supernet, args, **kwargs)
        self.distance = distance_of(supernet, args, learned=args.projection == "learned")
        processes = self.accelerator.num_processes
        self.subnet_loss = SubnetLoss(self.task, self.distance, args.distill_alpha, args.temperature, processes)
        self.means = RunningMeans()
        self.stage = args.stages_to_train[0]
        self._batch_counter = BatchCounter()
        self._update_follows = True  # of the optimizer: the next batch begins a step
        self._tasks: dict[tuple[str | None, bool], Task] = {}
        self._lm_head = vocabulary_head(supernet.model) if args.fused_head_loss else None
        self.teacher: FrozenTeacher | None = None  # of every subnet; None: maxnet teaches the others
        self.shares_head = True  # whether the teacher's LM head is the model's

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Runs K subnets on one batch forward and backward, maxnet first: its outputs are the teacher's.

        Returns:
            The weighted sum of their losses, without its graph.
        """
        self._set_mode(model)
        self._zero_projections()
        batch = self._batch_of(self._prepare_inputs(inputs), num_items_in_batch)
        subnets = self.draw_subnets()
        weights = self.loss_weights(subnets)
        run = self._execution(len(subnets))
        with without_sync(model):
            losses = run(self, self.subnet_loss, model, batch, subnets, weights)
        self._check_finite(subnets, losses)
        steps = self.args.torch_empty_cache_steps
        if steps is not None and self.state.global_step % steps == 0:
            clear_device_cache()
        self._update_follows = self.accelerator.sync_gradients
        if self.accelerator.sync_gradients:
            average_gradients(self._optimized_parameters(), self.accelerator.num_processes)
            self._check_gradients(subnets)
        self._add_to_means(subnets, losses, batch.accumulation)
        weighted = torch.stack([found.loss for found in losses]) * torch.tensor(weights, device=self.args.device)
        return weighted.sum() / batch.accumulation.divisor

    def draw_subnets(self) -> list[Subnet]:
        """Draws the subnets of one batch: maxnet, then those of `subnet_sampling`; maxnet alone in stage 0.

        They are the same in every process and after resuming: drawn from seed, stage, step and, unless
        `subnet_draws="step"`, the number of the batch among those that the step accumulates.
        """
        args, space, step = self.args, self.supernet.space, self.state.global_step
        batch = self._batch_counter.number_in(step)
        if args.subnet_draws == "step":
            batch = 0
        if self.stage == 0 or args.subnets_per_step == 1:
            return [space.max]
        strategy = SAMPLINGS[args.subnet_sampling]()
        generator = generator_of(args.seed, self.stage, step, batch)
        others = strategy.draw(space, args.subnets_per_step - 1, generator, depths=self.stage == 2)
        return [space.max, *others]

    def loss_weights(self, subnets: list[Subnet]) -> list[float]:
        """Returns (n_1 / n_j)^γ of each subnet, normalised as `gamma_normalization` says."""
        used = [max(self.supernet.count_trainable(subnet), 1) for subnet in subnets]
        weights = [(used[0] / n) ** self.args.gamma for n in used]
        divisors = {"weights": sum(weights), "count": float(len(weights)), "none": 1.0}
        divisor = divisors[self.args.gamma_normalization]
        return [weight / divisor for weight in weights]

    # ---- what a step is made of ---------------------------------------------------------------------------------

    def _set_mode(self, model: nn.Module) -> None:
        """Sets modules and optimizer to training; without dropout in stages that train without."""
        model.train()
        if callable(set_optimizer := getattr(self.optimizer, "train", None)):
            set_optimizer()
        if self.stage not in self.args.dropout_stages:
            without_dropout(model)

    def _batch_of(self, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None) -> Batch:
        """Gathers what the subnets have in common."""
        head = self._head_to_leave_out(inputs)
        smoothing = 0.0
        if head is not None and self.label_smoother is not None:
            smoothing = self.label_smoother.epsilon
        task = self.task_of_batch(inputs)
        return Batch(
            inputs,
            accumulation_of(self, num_items_in_batch),
            head,
            smoothing,
            unlabelled=task.unlabelled(inputs),
            own_loss=not self.has_transformers_loss(),
            task=task,
        )

    def task_of_batch(self, inputs: Mapping[str, Any]) -> Task:
        """Returns what kind of outputs the model has: where its configuration leaves it open, the labels say so."""
        labels = inputs.get("labels")
        problem = getattr(self.supernet.model.config, "problem_type", None)
        key = problem, isinstance(labels, Tensor) and is_a_number_per_label(labels)
        if key not in self._tasks:
            self._tasks[key] = task_of(self.supernet.model, labels if key[1] else None)
        return self._tasks[key]

    def _head_to_leave_out(self, inputs: Mapping[str, Any]) -> ElasticLinear | None:
        """Returns the LM head if the loss of the batch is computed from what goes into it, without logits.

        None where the loss is not transformers' own of these labels, or the head trains.
        """
        head, labels = self._lm_head, inputs.get("labels")
        if head is None or labels is None or "shift_labels" in inputs:
            return None
        if self.args.torch_compile or not self.has_transformers_loss() or not self.shares_head:
            return None
        if any(parameter.requires_grad for parameter in head.parameters()):
            return None
        return head

    def has_transformers_loss(self) -> bool:
        """Whether nobody has put a loss of his own in the place of transformers'."""
        return (
            self.compute_loss_func is None
            and getattr(self, "loss_is_scaled_for_ga", None) is None  # older transformers have no such switch
            and getattr(self.compute_loss, "__func__", None) is Trainer.compute_loss
            and (self.label_smoother is None or type(self.label_smoother) is LabelSmoother)
            and getattr(self.accelerator, "parallelism_config", None) is None
        )

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Names the parameters that weight decay applies to: those that it does in the plain model."""
        # transformers finds norms by their class and, of some families only, by their names
        norms = {name for name, module in model.named_modules() if isinstance(module, ElasticLayerNorm)}
        names = super().get_decay_parameter_names(model)
        return [name for name in names if name.rpartition(".")[0] not in norms]

    def _execution(self, count: int) -> Execution:
        """Returns how `count` subnets run; one has nobody to keep step with."""
        if count == 1:
            return one_by_one
        return EXECUTIONS[self.args.subnet_execution]

    def teach_with(self, teacher: FrozenTeacher | None) -> None:
        """Takes a teacher for the steps to come; None: maxnet."""
        self.teacher = teacher
        self.shares_head = teacher is None or self._lm_head is None or teacher.has_head_of(self._lm_head)

    def _zero_projections(self) -> None:
        """Zeroes the gradients of learned projections where a step begins: the Trainer zeroes the model's alone."""
        if self._update_follows:
            self.distance.zero_grad()

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        return super()._clip_grad_norm(self._all_that_trains(model))

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        return super()._get_grad_norm(self._all_that_trains(model), grad_norm=grad_norm)

    def _all_that_trains(self, model: nn.Module) -> nn.Module:
        """Returns a module with the parameters of the model and the projections that are learned."""
        if any(parameter.requires_grad for parameter in self.distance.parameters()):
            return nn.ModuleList([model, self.distance])
        return model

    def _optimized_parameters(self) -> list[nn.Parameter]:
        assert self.optimizer is not None
        return [parameter for group in self.optimizer.param_groups for parameter in group["params"]]

    def _add_to_means(self, subnets: list[Subnet], losses: list[LossOfSubnet], accumulation: Accumulation) -> None:
        """Adds the parts of each loss to the means of its kind of subnet: max, min or the rest."""
        # where each of the accumulated batches gives its share of the step's loss, their mean has to be their sum
        scale = accumulation.batches if accumulation.is_scaled else 1
        space = self.supernet.space
        smallest = space.min if self.stage == 2 else narrowest(space, depth=0)
        for i, (subnet, found) in enumerate(zip(subnets, losses, strict=True)):
            kind = "rest"
            if i == 0:
                kind = "max"
            elif subnet == smallest:
                kind = "min"
            self.means.add({name: part * scale for name, part in found.parts.items()}, prefix=f"{kind}_")

    def _check_finite(self, subnets: list[Subnet], losses: list[LossOfSubnet]) -> None:
        """Stops the run, and says what is left of it, if a loss is NaN or infinite."""
        faulty = [subnet for subnet, found in zip(subnets, losses, strict=True) if not torch.isfinite(found.loss)]
        if faulty:
            raise self._not_finite("the loss", self.state.global_step + 1, f"subnet {faulty[0]}")

    def _check_gradients(self, subnets: list[Subnet]) -> None:
        """Stops the run before an update by a gradient that is NaN or infinite, which no loss has shown.

        A scaler of the loss, as for fp16, makes such gradients itself now and then, and passes the update over.
        """
        if getattr(self.accelerator, "scaler", None) is not None:
            return
        gradients = [p.grad for p in self._optimized_parameters() if p.grad is not None]
        if gradients and not torch.isfinite(torch.nn.utils.get_total_norm(gradients)):
            of_which = f"subnets {', '.join(map(str, subnets))}"
            raise self._not_finite("a gradient", self.state.global_step + 1, of_which)

    def _not_finite(self, what: str, step: int, of_which: str) -> MLFSError:
        last = last_checkpoint(Path(self._get_output_dir(trial=None)))
        kept = f"the last good checkpoint is {last}" if last else "there is no checkpoint of this stage yet"
        return MLFSError(
            f"{what} became NaN or infinite at stage {self.stage}, step {step}, {of_which}; {kept}. "
            f"Resume with a lower learning rate (now {self._get_learning_rate():.3g}), or check the data"
        )
