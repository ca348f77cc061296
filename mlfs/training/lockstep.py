"""One batch for all subnets of an iteration, and each subnet's part of what the model gives for it."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import ModelOutput

from mlfs.models.fused.lm_head import HEAD_INPUT
from mlfs.space.subnet import Subnet

_LABELS = ("labels", "start_positions", "end_positions")


def rows_of(inputs: Mapping[str, Any]) -> int:
    """Rows of the batch."""
    return next(v.shape[0] for k, v in inputs.items() if k in ("input_ids", "inputs_embeds") and v is not None)


def together(inputs: Mapping[str, Any], count: int) -> dict[str, Any]:
    """The batch `count` times over, without labels: each subnet's loss is computed from its own rows."""
    rows = rows_of(inputs)

    def repeat(value: Any) -> Any:
        if isinstance(value, Tensor) and value.dim() and value.shape[0] == rows:
            return torch.cat([value] * count)
        return value

    return {key: repeat(value) for key, value in inputs.items() if key not in _LABELS}


def part_of(outputs: Mapping[str, Any], i: int, rows: int, subnet: Subnet) -> ModelOutput:
    """What the i-th subnet gave: its rows; of hidden states, those of its layers, as wide as it is, and of what goes
    into a head that is left out, as much as it has."""

    def cut(value: Any) -> Any:
        return value[i * rows : (i + 1) * rows] if isinstance(value, Tensor) else None

    found = {key: cut(value) for key, value in outputs.items() if isinstance(value, Tensor)}
    if HEAD_INPUT in found:
        found[HEAD_INPUT] = found[HEAD_INPUT][..., : subnet.hidden]
    if (states := outputs.get("hidden_states")) is not None:
        kept = [0, *(layer + 1 for layer in subnet.layers)]
        found["hidden_states"] = tuple(cut(states[k])[..., : subnet.hidden] for k in kept)
    return ModelOutput(found)


class Computed(nn.Module):
    """Stands for a model whose outputs are there already: called with labels it adds the loss the model would have."""

    def __init__(self, model: Any, outputs: ModelOutput) -> None:
        super().__init__()
        self._model, self._outputs = (model,), outputs  # in a tuple: not a submodule

    def forward(
        self,
        labels: Tensor | None = None,
        start_positions: Tensor | None = None,
        end_positions: Tensor | None = None,
        num_items_in_batch: Any = None,
        **inputs: Any,
    ) -> ModelOutput:
        (model,), outputs = self._model, self._outputs
        extra = {} if num_items_in_batch is None else {"num_items_in_batch": num_items_in_batch}
        if start_positions is not None:
            ends = outputs["start_logits"], outputs["end_logits"]
            loss = model.loss_function(*ends, start_positions, end_positions, **extra)
        elif labels is not None:
            logits = outputs["logits"]
            vocabulary = {"vocab_size": logits.shape[-1]}
            loss = model.loss_function(
                logits=logits, labels=labels, pooled_logits=logits, config=model.config, **vocabulary, **extra
            )
        else:
            return outputs
        return ModelOutput({"loss": loss, **outputs})

    def _get_name(self) -> str:
        return type(self._model[0]).__name__
