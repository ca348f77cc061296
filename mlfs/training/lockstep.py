"""One batch for all subnets of a step, and each subnet's part of what the model gives for it."""

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import ModelOutput

from mlfs.errors import MLFSError
from mlfs.models.fused.lm_head import HEAD_INPUT
from mlfs.space.dimensions import LayerSizes
from mlfs.training.inputs import LABELS

_AS_WIDE_AS_THE_SUBNET = (HEAD_INPUT, "last_hidden_state", "pooler_output")


def rows_of(inputs: Mapping[str, Any]) -> int:
    """Counts the rows of a batch.

    Raises:
        MLFSError: a batch without input_ids and inputs_embeds.
    """
    for name in ("input_ids", "inputs_embeds"):
        if inputs.get(name) is not None:
            return int(inputs[name].shape[0])
    raise MLFSError(
        f"subnet_execution='lockstep': a batch of {', '.join(inputs)} has neither input_ids nor inputs_embeds; "
        "use 'sequential'"
    )


def repeat(inputs: Mapping[str, Any], count: int) -> dict[str, Any]:
    """Returns a batch without labels `count` times over: each subnet's loss is computed from its own rows."""
    rows = rows_of(inputs)
    repeated = {}
    for name, value in inputs.items():
        if isinstance(value, Tensor) and value.dim() and value.shape[0] == rows:
            value = torch.cat([value] * count)
        repeated[name] = value
    return repeated


def part_of(outputs: Mapping[str, Any], i: int, rows: int, sizes: LayerSizes) -> ModelOutput:
    """Returns what the i-th subnet gave: rows i * rows to (i + 1) * rows of each tensor.

    Hidden states are those of the subnet's layers. They, and what goes into a head that is left out, are as wide as
    the subnet is.
    """
    own_rows = slice(i * rows, (i + 1) * rows)
    part: dict[str, Any] = {name: value[own_rows] for name, value in outputs.items() if isinstance(value, Tensor)}
    for name in _AS_WIDE_AS_THE_SUBNET:
        if name in part:
            part[name] = part[name][..., : sizes.subnet.hidden]
    states = outputs.get("hidden_states")
    if states is not None:
        # state 0 is what goes into the first layer
        kept = [0, *(layer + 1 for layer in sizes.layers)]
        part["hidden_states"] = tuple(states[k][own_rows, ..., : sizes.subnet.hidden] for k in kept)
    return ModelOutput(part)


class ComputedOutputs(nn.Module):
    """Stands for a model whose outputs are there already: called with labels it adds the loss the model would have.

    Whatever else it is asked for, its configuration, say, is the model's.

    Args:
        model: whose loss function and name it has.
        outputs: what it returns.
        inputs: what the outputs are of, before it was repeated; without labels.
    """

    def __init__(self, model: Any, outputs: ModelOutput, inputs: Mapping[str, Any]) -> None:
        super().__init__()
        self._model = (model,)  # in a tuple: not a submodule
        self._outputs, self._inputs = outputs, inputs
        self._calls = 0
        self.training = model.training

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "_model":
                raise
            return getattr(self._model[0], name)

    def forward(self, *args: Any, **inputs: Any) -> ModelOutput:
        """Returns the outputs, with a loss where there are labels; takes what `Trainer.compute_loss` gives a model.

        Raises:
            MLFSError: other inputs than those of the batch, or a second call: the outputs would not be of these.
        """
        (model,), outputs = self._model, self._outputs
        if args:
            inputs |= inspect.signature(model.forward).bind_partial(*args).arguments
        self._check(inputs)
        items = inputs.get("num_items_in_batch")
        options = {} if items is None else {"num_items_in_batch": items}
        if inputs.get("start_positions") is not None:
            start, end = outputs["start_logits"], outputs["end_logits"]
            positions = inputs["start_positions"], inputs["end_positions"]
            loss = model.loss_function(start, end, *positions, **options)
        elif inputs.get("labels") is not None:
            logits = outputs["logits"]
            if inputs.get("shift_labels") is not None:
                options["shift_labels"] = inputs["shift_labels"]
            loss = model.loss_function(
                logits=logits,
                labels=inputs["labels"],
                pooled_logits=logits,
                config=model.config,
                vocab_size=logits.shape[-1],
                **options,
            )
        else:
            return outputs
        return ModelOutput({"loss": loss, **outputs})

    def _check(self, inputs: Mapping[str, Any]) -> None:
        """Refuses a call whose outputs are not there."""
        self._calls += 1
        of_batch = self._inputs
        named = [name for name in {**of_batch, **inputs} if name not in (*LABELS, "num_items_in_batch")]
        tensors = [name for name in named if any(isinstance(of.get(name), Tensor) for of in (of_batch, inputs))]
        changed = [name for name in tensors if inputs.get(name) is not of_batch.get(name)]
        if changed or self._calls > 1:
            what = f"other {changed[0]} than the batch's" if changed else "the same batch again"
            raise MLFSError(
                f"compute_loss calls the model with {what}: subnet_execution='lockstep' runs it once, on the batch as "
                "it is; use 'sequential'"
            )

    def _get_name(self) -> str:
        """Returns the model's name: the Trainer shifts the labels of causal language models by it."""
        return type(self._model[0]).__name__
