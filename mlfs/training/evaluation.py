"""A transformers Trainer that evaluates a palette of subnets instead of one model."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch.utils.data import DataLoader
from transformers import Trainer

from mlfs.models.fused.padding import heads_read_no_padding, reads_no_padding, without_padding
from mlfs.parsing import parse_json
from mlfs.report.cost import latency, size_on_disk
from mlfs.space.subnet import Subnet
from mlfs.supernet.model import SuperTransformer
from mlfs.training.arguments import MLFSArguments
from mlfs.training.inputs import without_labels
from mlfs.training.task import task_of


class PaletteTrainer(Trainer):
    """Evaluates named subnets of one super-transformer; trains nothing of its own.

    Args:
        supernet: what is evaluated.
        args: `palette` names the subnets; by default the space's own palette.
        **kwargs: of `transformers.Trainer`.

    Raises:
        MLFSError: a palette outside the space.
    """

    args: MLFSArguments

    def __init__(self, supernet: SuperTransformer, args: MLFSArguments, **kwargs: Any) -> None:
        self.supernet = supernet
        self.palette = supernet.space.palette()
        if args.palette is not None:
            self.palette = {
                name: Subnet.from_dict(value) for name, value in parse_json(args.palette, "palette").items()
            }
        for subnet in self.palette.values():
            supernet.layer_sizes(subnet)  # refused here rather than where it runs
        self.task = task_of(supernet.model)
        super().__init__(model=supernet.model, args=args, **kwargs)
        if not self.task.divides_by_items:
            self.model_accepts_loss_kwargs = False

    def prediction_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Runs one batch as `transformers.Trainer` does; encoders skip the padding, where they can."""
        with without_padding(reads_no_padding(inputs) and heads_read_no_padding(self.supernet.model)):
            return super().prediction_step(model, inputs, *args, **kwargs)

    def subnets_to_evaluate(self) -> dict[str, Subnet]:
        """Returns what `evaluate` runs: the palette."""
        return self.palette

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Evaluates every subnet of `subnets_to_evaluate`.

        Args:
            eval_dataset: as of `transformers.Trainer`: of several sets, by names, each is evaluated by itself, and
                NAME_OF_SET stands before the names of its metrics.

        Returns:
            `eval_NAME_METRIC`, `eval_NAME_parameters` and `eval_NAME_latency` (seconds a batch) of each subnet, and
            `eval_METRIC`, the mean over the palette, for `metric_for_best_model`.
        """
        sets = self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(sets, dict):
            metrics: dict[str, float] = {}
            for name, one in sets.items():
                # the Trainer keeps the loaders of its own sets by their names
                chosen = name if eval_dataset is None else one
                prefix = f"{metric_key_prefix}_{name}"
                metrics |= self.evaluate(eval_dataset=chosen, ignore_keys=ignore_keys, metric_key_prefix=prefix)
            return metrics
        loader = self.get_eval_dataloader(sets)
        palette = self.subnets_to_evaluate()
        # A loader draws a number each time it is gone through. Training goes on with the numbers it would have had with
        # one evaluation of one model, as by Trainer: else the sizes of the palette would change what is learned.
        before, draws = torch.get_rng_state(), [(g, g.get_state()) for g in _generators(loader)]
        batch = self._prepare_inputs(dict(next(iter(loader))))
        sample = without_labels(self.supernet.model, batch, self.label_names)
        ignored = [*(ignore_keys or []), "hidden_states", "attentions", "past_key_values"]
        metrics = {}
        values: dict[str, list[float]] = {}  # of each metric, over the subnets
        for name, subnet in palette.items():
            prefix = f"{metric_key_prefix}_{name}"
            torch.set_rng_state(before)
            for generator, state in draws:
                generator.set_state(state)
            with self.supernet.activate(subnet):
                scores = self._score(loader, f"Evaluation of {name} ({subnet})", ignored, prefix)
                cost = {"latency": latency(self.model, sample)}
            cost["parameters"] = self.supernet.count_parameters(subnet)
            cost["bytes"] = size_on_disk(self.supernet, subnet)
            metrics |= {f"{prefix}_{key}": value for key, value in (scores | cost).items()}
            for key, value in scores.items():
                if isinstance(value, (int, float)):
                    values.setdefault(key, []).append(float(value))
        for key, of_subnets in values.items():
            if len(of_subnets) == len(palette):
                metrics[f"{metric_key_prefix}_{key}"] = sum(of_subnets) / len(of_subnets)
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _score(self, loader: DataLoader, description: str, ignored: list[str], prefix: str) -> dict[str, Any]:
        """Runs the active subnet over the evaluation data; returns its metrics, by names without the prefix."""
        output = self.evaluation_loop(
            loader,
            description=description,
            prediction_loss_only=True if self.compute_metrics is None else None,
            ignore_keys=ignored,
            metric_key_prefix=prefix,
        )
        scores = {key.removeprefix(f"{prefix}_"): value for key, value in (output.metrics or {}).items()}
        scores.pop("model_preparation_time", None)
        return scores

    def results(self, metrics: Mapping[str, float], metric_key_prefix: str = "eval") -> list[dict[str, Any]]:
        """Sorts what `evaluate` returned into one row for each subnet: for a table, or for JSON."""
        rows = []
        for name, subnet in self.palette.items():
            prefix = f"{metric_key_prefix}_{name}_"
            # of two names one may begin with the other: the longest that fits owns the key
            others = (other for other in self.palette if other != name and other.startswith(f"{name}_"))
            longer = tuple(f"{metric_key_prefix}_{other}_" for other in others)
            found = {
                key.removeprefix(prefix): value
                for key, value in metrics.items()
                if key.startswith(prefix) and not key.startswith(longer)
            }
            if found:
                # by name: what a number of layers stands for is part of what was evaluated
                sizes = replace(subnet, layers=self.supernet.kept_layers(subnet)).to_dict()
                row = {"name": name, "subnet": str(subnet), "sizes": sizes, **found}
                rows.append(row | {"exportable": self.supernet.is_exportable(subnet)})
        return rows


def _generators(loader: Any) -> list[torch.Generator]:
    """Collects the generators that the order of a loader's batches comes from, beside PyTorch's global one."""
    found: dict[int, torch.Generator] = {}
    parts, seen = [loader], set()
    while parts:
        part = parts.pop()
        if part is None or id(part) in seen:
            continue
        seen.add(id(part))
        for name in ("generator", "synchronized_generator"):
            if isinstance(generator := getattr(part, name, None), torch.Generator):
                found[id(generator)] = generator
        parts += [getattr(part, name, None) for name in ("sampler", "batch_sampler")]
    return list(found.values())
