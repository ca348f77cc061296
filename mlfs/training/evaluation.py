"""A transformers Trainer that evaluates a palette of subnets instead of one model."""

import json
from collections.abc import Mapping
from typing import Any

from transformers import Trainer

from mlfs.errors import MLFSError
from mlfs.models.fused.padding import reads_no_padding, without_padding
from mlfs.report.cost import latency, size_on_disk
from mlfs.space.subnet import Subnet
from mlfs.supernet.model import SuperTransformer
from mlfs.training.arguments import MLFSArguments


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
            self.palette = {name: Subnet.from_dict(value) for name, value in json.loads(args.palette).items()}
        for subnet in self.palette.values():
            supernet.space.check(subnet)
        super().__init__(model=supernet.model, args=args, **kwargs)

    def prediction_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """As in `transformers.Trainer`; encoders skip the padding, where they can."""
        with without_padding(reads_no_padding(inputs)):
            return super().prediction_step(model, inputs, *args, **kwargs)

    def subnets_to_evaluate(self) -> dict[str, Subnet]:
        """What `evaluate` runs: the palette."""
        return self.palette

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Evaluates every subnet of `subnets_to_evaluate`.

        Returns:
            `eval_NAME_METRIC`, `eval_NAME_parameters` and `eval_NAME_latency` (seconds a batch) of each subnet, and
            `eval_METRIC`, the mean over the palette, for `metric_for_best_model`.
        """
        if isinstance(eval_dataset or self.eval_dataset, dict):
            raise MLFSError("several evaluation sets at once are not supported: call evaluate for each")
        loader = self.get_eval_dataloader(eval_dataset)
        palette = self.subnets_to_evaluate()
        sample = self._prepare_inputs(dict(next(iter(loader))))
        metrics: dict[str, float] = {}
        shared: dict[str, list[float]] = {}
        for name, subnet in palette.items():
            prefix = f"{metric_key_prefix}_{name}"
            with self.supernet.activate(subnet):
                output = self.evaluation_loop(
                    loader,
                    description=f"Evaluation of {name} ({subnet})",
                    prediction_loss_only=True if self.compute_metrics is None else None,
                    ignore_keys=[*(ignore_keys or []), "hidden_states", "attentions", "past_key_values"],
                    metric_key_prefix=prefix,
                )
                found = {k.removeprefix(f"{prefix}_"): v for k, v in (output.metrics or {}).items()}
                found.pop("model_preparation_time", None)
                for key, value in found.items():
                    if isinstance(value, (int, float)):
                        shared.setdefault(key, []).append(float(value))
                found["latency"] = latency(self.model, sample)
            found["parameters"] = self.supernet.count_parameters(subnet)
            found["bytes"] = size_on_disk(self.supernet, subnet)
            metrics |= {f"{prefix}_{key}": value for key, value in found.items()}
        metrics |= {
            f"{metric_key_prefix}_{key}": sum(v) / len(v) for key, v in shared.items() if len(v) == len(palette)
        }
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def results(self, metrics: Mapping[str, float], metric_key_prefix: str = "eval") -> list[dict[str, Any]]:
        """What `evaluate` returned, one row for each subnet: for a table, or for JSON."""
        rows = []
        for name, subnet in self.palette.items():
            prefix = f"{metric_key_prefix}_{name}_"
            # of two names one may begin with the other: the longest that fits owns the key
            longer = [f"{metric_key_prefix}_{n}_" for n in self.palette if n != name and n.startswith(f"{name}_")]
            found = {
                k.removeprefix(prefix): v
                for k, v in metrics.items()
                if k.startswith(prefix) and not k.startswith(tuple(longer))
            }
            if found:
                rows.append({"name": name, "subnet": str(subnet), "sizes": subnet.to_dict(), **found})
        return rows
