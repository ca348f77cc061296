"""One training step of a super-transformer: K subnets on one batch, each learning from maxnet (arXiv 2404.01353)."""

import contextlib
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import Trainer
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.trainer_pt_utils import LabelSmoother

from mlfs.elastic.linear import ElasticLinear
from mlfs.errors import MLFSError
from mlfs.models.configuration import has_final_norm
from mlfs.models.fused.lm_head import HEAD_INPUT, vocabulary_head, without_logits
from mlfs.models.fused.padding import reads_no_padding, without_padding
from mlfs.ops.head_loss import IGNORED, head_loss
from mlfs.space.subnet import Subnet
from mlfs.supernet.model import SuperTransformer
from mlfs.training.arguments import MLFSArguments
from mlfs.training.distillation import Distiller, detached
from mlfs.training.evaluation import PaletteTrainer
from mlfs.training.lockstep import Computed, part_of, rows_of, together
from mlfs.training.runs import last_checkpoint


class SubnetTrainer(PaletteTrainer):
    """A Trainer whose steps train several subnets. Which stage trains, and what is saved, is for `MLFSTrainer`.

    Args:
        supernet: what trains. args: the options. **kwargs: of `transformers.Trainer`.
    """

    def __init__(self, supernet: SuperTransformer, args: MLFSArguments, **kwargs: Any) -> None:
        super().__init__(supernet, args, **kwargs)
        config = self.supernet.model.config
        self.causal = type(self.supernet.model).__name__ in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
        problem = getattr(config, "problem_type", None)
        self.regression = problem == "regression" or (problem is None and getattr(config, "num_labels", 2) == 1)
        self.multi_label = problem == "multi_label_classification"
        if not self.causal:
            # Their losses are means over the batch, whatever number of items they are told of.
            self.model_accepts_loss_kwargs = False
        dims = self.supernet.dimensions
        self.distiller = Distiller(
            dims.hidden,
            dims.layers,
            args.distill_alpha,
            args.distill_beta,
            args.temperature,
            args.projection_size,
            args.projection == "learned",
            args.seed,
            has_final_norm(self.supernet.family),
        ).to(self.supernet.model.device)
        self._head = vocabulary_head(self.supernet.model) if args.fused_head_loss else None
        self.stage = args.stages_to_train[0]
        self._draws = (-1, 0)  # (global step, batches seen within it)
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """K subnets on one batch, maxnet first: its outputs are the teacher's. Returns the weighted loss, detached."""
        self._set_mode(model)
        inputs = self._prepare_inputs(inputs)
        subnets = self.draw_subnets()
        weights = self.loss_weights(subnets)
        run = self._lockstep if self.args.subnet_execution == "lockstep" and len(subnets) > 1 else self._one_by_one
        with self._without_sync(model):
            losses = run(model, inputs, subnets, weights, num_items_in_batch)
        if not all(torch.isfinite(loss) for loss in losses):
            self._stop_at_nan(subnets, losses)
        self._sum_gradients()
        weighted = torch.stack(losses) * torch.tensor(weights, device=self.args.device)
        return weighted.sum() / self._divisor(num_items_in_batch)

    def _one_by_one(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        subnets: list[Subnet],
        weights: list[float],
        num_items_in_batch: Tensor | int | None,
    ) -> list[Tensor]:
        """Forward and backward passes of one subnet after the other; their losses, detached."""
        teacher, losses, head, packs = None, [], self._head_to_defer(inputs), reads_no_padding(inputs)
        for subnet, weight in zip(subnets, weights, strict=True):
            batch = dict(inputs)
            if len(subnets) > 1 and self.distiller.uses_features:
                batch["output_hidden_states"] = True
            # the backward pass may recompute: it stays inside
            with self.supernet.activate(subnet):
                with self.compute_loss_context_manager(), without_padding(packs):
                    if head is None:
                        task, outputs = self.compute_loss(model, batch, True, num_items_in_batch)
                    else:
                        task, outputs = None, without_logits(model, head, batch)
                    loss = self._subnet_loss(subnet, task, outputs, teacher, inputs, num_items_in_batch)
                    teacher = detached(outputs) if teacher is None else teacher
                self.accelerator.backward(loss * (weight / self._divisor(num_items_in_batch)))
            losses.append(loss.detach())
        return losses

    def _lockstep(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        subnets: list[Subnet],
        weights: list[float],
        num_items_in_batch: Tensor | int | None,
    ) -> list[Tensor]:
        """One pass of all subnets together, each on its own copy of the batch's rows; their losses, detached."""
        batch, count, head = together(inputs, len(subnets)), rows_of(inputs), self._head_to_defer(inputs)
        if self.distiller.uses_features:
            batch["output_hidden_states"] = True
        rows = [subnet for subnet in subnets for _ in range(count)]
        with self.supernet.activate_rows(rows):
            with self.compute_loss_context_manager():
                outputs = model(**batch) if head is None else without_logits(model, head, batch)
                total, teacher, losses = torch.zeros((), device=self.args.device), None, []
                for i, (subnet, weight) in enumerate(zip(subnets, weights, strict=True)):
                    task, mine = None, part_of(outputs, i, count, subnet)
                    if head is None:
                        stand_in = Computed(self.accelerator.unwrap_model(model), mine)
                        task, mine = self.compute_loss(stand_in, dict(inputs), True, num_items_in_batch)
                    loss = self._subnet_loss(subnet, task, mine, teacher, inputs, num_items_in_batch)
                    teacher = detached(mine) if teacher is None else teacher
                    total = total + loss * weight
                    losses.append(loss.detach())
            self.accelerator.backward(total / self._divisor(num_items_in_batch))
        return losses

    def _subnet_loss(
        self,
        subnet: Subnet,
        task: Tensor | None,
        outputs: Any,
        teacher: dict[str, Any] | None,
        inputs: dict[str, Any],
        num_items_in_batch: Tensor | int | None,
    ) -> Tensor:
        """The task loss of the first subnet, the teacher; of the others with what they learn from it. Recorded.

        Args:
            task: the task loss; None where there are no logits: it is computed here, from what goes into the head.
        """
        shares = teacher is not None and self._is_scaled(num_items_in_batch)
        share = self._share(inputs, num_items_in_batch) if shares else 1.0
        parts: dict[str, Tensor] = {}
        if task is None:
            loss, parts = self._head_loss(outputs, teacher, inputs, num_items_in_batch)
            if teacher is not None:
                attention = inputs.get("attention_mask")
                loss, parts = self.distiller.add_features(loss, parts, subnet, outputs, teacher, attention, share)
        elif teacher is not None:
            kinds = {"causal": self.causal, "regression": self.regression, "multi_label": self.multi_label}
            loss, parts = self.distiller(subnet, task, outputs, teacher, inputs, share, **kinds)
        else:
            loss = task
        who = "max" if teacher is None else "min" if subnet == self._min else "rest"
        self._record(who, {**parts, "loss": loss.detach()})
        return loss

    def _head_to_defer(self, inputs: Mapping[str, Any]) -> ElasticLinear | None:
        """The head that is left out of the forward passes, its loss computed without logits; None where the loss is
        not transformers' own of these labels, or the head trains."""
        own_loss = (
            self.compute_loss_func is None
            and getattr(self.compute_loss, "__func__", None) is Trainer.compute_loss
            and (self.label_smoother is None or type(self.label_smoother) is LabelSmoother)
            and getattr(self.accelerator, "parallelism_config", None) is None
        )
        head, labels = self._head, inputs.get("labels")
        if head is None or not own_loss or self.args.torch_compile or labels is None or "shift_labels" in inputs:
            return None
        return None if any(p.requires_grad for p in head.parameters()) else head

    def _head_loss(
        self,
        outputs: Mapping[str, Any],
        teacher: Mapping[str, Any] | None,
        inputs: Mapping[str, Any],
        num_items_in_batch: Tensor | int | None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """What `compute_loss` and the divergence of the distiller come to together, and these two."""
        head, labels = self._head, inputs["labels"]
        assert head is not None
        if self.causal:  # each token's label is the next one
            labels = nn.functional.pad(labels, (0, 1), value=IGNORED)[..., 1:]
        goal = None if teacher is None else teacher[HEAD_INPUT]
        smoothing = 0.0 if self.label_smoother is None else self.label_smoother.epsilon
        options = self.distiller.alpha, self.distiller.temperature, smoothing
        sums = head_loss(outputs[HEAD_INPUT], head.weight, head.bias, labels, goal, *options)
        items = self._items(num_items_in_batch) if self._is_scaled(num_items_in_batch) else labels.ne(IGNORED).sum()
        loss, task, kl = (value / items for value in sums)
        return loss, {} if teacher is None else {"task": task, "kl": kl}

    def _divisor(self, num_items_in_batch: Tensor | int | None) -> int:
        """What losses are divided by where gradients accumulate: nothing, if they are scaled to the whole already."""
        return 1 if self._is_scaled(num_items_in_batch) else self.current_gradient_accumulation_steps

    def _is_scaled(self, num_items_in_batch: Tensor | int | None) -> bool:
        """Whether the model's loss is its share of the accumulated batch's already."""
        return self.model_accepts_loss_kwargs and num_items_in_batch is not None

    def draw_subnets(self) -> list[Subnet]:
        """The subnets of this iteration: maxnet, then those of `subnet_sampling`; maxnet alone in stage 0. The same in
        every process and after resuming: drawn from seed, stage, step and batch."""
        step, seen = self._draws
        seen = seen + 1 if step == self.state.global_step else 0
        self._draws = (self.state.global_step, seen)
        space, count, depths = self.supernet.space, self.args.subnets_per_step, self.stage == 2
        if self.stage == 0 or count == 1:
            return [space.max]
        key = f"{self.args.seed}/{self.stage}/{self.state.global_step}/{seen}"
        generator = torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(key.encode()).digest()[:7], "big"))
        if self.args.subnet_sampling == "random":
            return [space.max, *(space.sample(generator, depths) for _ in range(count - 1))]
        depth = int(torch.randint(len(space.layers), (1,), generator=generator)) if depths else 0
        narrow = Subnet(space.hidden[-1], space.heads[-1], space.ffn[-1], space.layers[depth])
        draws = [space.sample if i % 2 else space.sample_level for i in range(count - 2)]
        return [space.max, narrow, *(draw(generator, depths) for draw in draws)]

    def loss_weights(self, subnets: list[Subnet]) -> list[float]:
        """(n_1 / n_j)^γ of each subnet, normalised as `gamma_normalization` says."""
        used = [max(self.supernet.count_trainable(subnet), 1) for subnet in subnets]
        weights = [(used[0] / n) ** self.args.gamma for n in used]
        divisor = {"weights": sum(weights), "count": float(len(weights)), "none": 1.0}[self.args.gamma_normalization]
        return [weight / divisor for weight in weights]

    @property
    def _min(self) -> Subnet:
        space = self.supernet.space
        return (
            space.min if self.stage == 2 else Subnet(space.hidden[-1], space.heads[-1], space.ffn[-1], space.layers[0])
        )

    def _set_mode(self, model: nn.Module) -> None:
        model.train()
        if callable(to_train := getattr(self.optimizer, "train", None)):
            to_train()
        if self.stage not in self.args.dropout_stages:
            for module in model.modules():
                # what may recompute its activations asks `training` whether to
                if not hasattr(module, "gradient_checkpointing"):
                    module.training = False

    def _share(self, inputs: Mapping[str, Any], num_items_in_batch: Any) -> Tensor:
        labels = inputs["labels"]
        return (labels[:, 1:] if self.causal else labels).ne(IGNORED).sum() / self._items(num_items_in_batch)

    def _items(self, num_items_in_batch: Any) -> Any:
        """Of the accumulated batch, for each process where gradients are averaged over them."""
        across = self.args.average_tokens_across_devices
        return num_items_in_batch / self.accelerator.num_processes if across else num_items_in_batch

    def _without_sync(self, model: nn.Module) -> Any:
        # A subnet leaves parameters out, which DistributedDataParallel does not expect: gradients are summed here.
        return model.no_sync() if hasattr(model, "no_sync") else contextlib.nullcontext()  # type: ignore[operator]

    def _sum_gradients(self) -> None:
        if self.accelerator.num_processes == 1 or not self.accelerator.sync_gradients:
            return
        assert self.optimizer is not None
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        flat = torch.cat([p.grad.reshape(-1) for p in parameters])
        dist.all_reduce(flat)
        flat /= self.accelerator.num_processes
        for parameter, grad in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
            parameter.grad = grad.view_as(parameter).clone()

    def _stop_at_nan(self, subnets: list[Subnet], losses: list[Tensor]) -> None:
        bad = next((s for s, loss in zip(subnets, losses, strict=True) if not torch.isfinite(loss)), subnets[0])
        last = last_checkpoint(Path(self._get_output_dir(None)))
        kept = f"the last good checkpoint is {last}" if last else "there is no checkpoint of this stage yet"
        raise MLFSError(
            f"the loss became NaN or infinite at stage {self.stage}, step {self.state.global_step + 1}, subnet {bad}; "
            f"{kept}. Resume with a lower learning rate (now {self._get_learning_rate():.3g}), or check the data"
        )

    def _record(self, who: str, parts: Mapping[str, Tensor]) -> None:
        for key, value in parts.items():
            name = f"{who}_{key}"
            self._sums[name] = self._sums[name] + value if name in self._sums else value
            self._counts[name] = self._counts.get(name, 0) + 1
