"""One batch for all subnets of a step, and each subnet's part of what the model gives for it."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import ModelOutput

from mlfs.models.fused.lm_head import HEAD_INPUT
from mlfs.space.subnet import Subnet

_LABELS = ("labels", "start_positions", "end_positions")


def rows_of(inputs: Mapping[str, Any]) -> int:
    """Counts the rows of a batch."""
    for name in ("input_ids", "inputs_embeds"):
        if inputs.get(name) is not None:
            return int(inputs[name].shape[0])
    raise KeyError("a batch without input_ids and inputs_embeds")


def repeat(inputs: Mapping[str, Any], count: int) -> dict[str, Any]:
    """Returns the batch `count` times over, without labels: each subnet's loss is computed from its own rows."""
    rows = rows_of(inputs)
    repeated = {}
    for name, value in inputs.items():
        if name in _LABELS:
            continue
        if isinstance(value, Tensor) and value.dim() and value.shape[0] == rows:
            value = torch.cat([value] * count)
        repeated[name] = value
    return repeated


def part_of(outputs: Mapping[str, Any], i: int, rows: int, subnet: Subnet) -> ModelOutput:
    """Returns what the i-th subnet gave: rows i * rows to (i + 1) * rows of each tensor.

    Hidden states are those of the subnet's layers. They, and what goes into a head that is left out, are as wide as
    the subnet is.
    """
    own_rows = slice(i * rows, (i + 1) * rows)
    part: dict[str, Any] = {name: value[own_rows] for name, value in outputs.items() if isinstance(value, Tensor)}
    if HEAD_INPUT in part:
        part[HEAD_INPUT] = part[HEAD_INPUT][..., : subnet.hidden]
    states = outputs.get("hidden_states")
    if states is not None:
        # state 0 is what goes into the first layer
        kept = [0, *(layer + 1 for layer in subnet.layers)]
        part["hidden_states"] = tuple(states[k][own_rows, ..., : subnet.hidden] for k in kept)
    return ModelOutput(part)


class ComputedOutputs(nn.Module):
    """Stands for a model whose outputs are there already: called with labels it adds the loss the model would have.

    Args:
        model: whose loss function and name it has.
        outputs: what it returns.
    """

    def __init__(self, model: Any, outputs: ModelOutput) -> None:
        super().__init__()
        self._model = (model,)  # in a tuple: not a submodule
        self._outputs = outputs

    def forward(
        self,
        labels: Tensor | None = None,
        start_positions: Tensor | None = None,
        end_positions: Tensor | None = None,
        num_items_in_batch: Any = None,
        **inputs: Any,
    ) -> ModelOutput:
        """Returns the outputs, with a loss where there are labels; takes what `Trainer.compute_loss` gives a model."""
        (model,), outputs = self._model, self._outputs
        options = {} if num_items_in_batch is None else {"num_items_in_batch": num_items_in_batch}
        if start_positions is not None:
            start, end = outputs["start_logits"], outputs["end_logits"]
            loss = model.loss_function(start, end, start_positions, end_positions, **options)
        elif labels is not None:
            logits = outputs["logits"]
            loss = model.loss_function(
                logits=logits,
                labels=labels,
                pooled_logits=logits,
                config=model.config,
                vocab_size=logits.shape[-1],
                **options,
            )
        else:
            return outputs
        return ModelOutput({"loss": loss, **outputs})

    def _get_name(self) -> str:
        """Returns the model's name: the Trainer shifts the labels of causal language models by it."""
        return type(self._model[0]).__name__
