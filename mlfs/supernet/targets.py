"""A model's own predictions as targets, where calibration data has no labels.

Against the predictions themselves the loss is least, so that it tells how far a part of the model is from the whole;
but its gradient there is zero. Labels drawn from the predictions have one, as labels of the data do: the scores are
then those of the predictions' Fisher information.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from mlfs.errors import MLFSError

_PREDICTIONS = ("logits", "start_logits", "end_logits")  # else the hidden states themselves are what a model gives
LABELS = ("labels", "start_positions", "end_positions", "shift_labels")


def has_labels(batch: Mapping[str, Any]) -> bool:
    """Tells whether a batch has labels of any kind."""
    return any(batch.get(name) is not None for name in LABELS)


def on_device(batch: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """Moves the tensors of a batch to a device."""
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}


def loss_on(
    model: PreTrainedModel,
    inputs: Mapping[str, Any],
    targets: "OwnTargets | None" = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Runs a model on a batch and returns its own loss, a scalar; without labels, that against its own predictions.

    Args:
        targets: of the whole model; by default they are drawn from what the model gives now, by `generator`.
    """
    if has_labels(inputs):
        return model(**inputs).loss  # type: ignore[no-any-return]
    outputs = model(**inputs)
    if targets is None:
        targets = OwnTargets(outputs, inputs.get("attention_mask"), model.config.problem_type, generator)
    return targets.loss(outputs)


class OwnTargets:
    """What a model's outputs are compared with: the predictions of the whole model on one batch, or drawn from them.

    Args:
        outputs: of the whole model: with logits, with start_logits and end_logits, or with last_hidden_state.
        attention_mask: (batch, tokens); padding does not count where there is an output for each token.
        problem_type: of the model's configuration.
        generator: of the random numbers, on the CPU; None for the predictions themselves.

    Raises:
        MLFSError: outputs that have none of these.
    """

    def __init__(
        self,
        outputs: Mapping[str, Any],
        attention_mask: Tensor | None = None,
        problem_type: str | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        self.problem_type, self.attention_mask = problem_type, attention_mask
        self.targets: dict[str, Tensor] = {}
        for name in self._names(outputs):
            self.targets[name] = self._draw(name, outputs[name].detach(), generator)

    def loss(self, outputs: Mapping[str, Any]) -> Tensor:
        """Computes the mean loss of a model's outputs, a scalar: the cross-entropy of classes, or half the squared
        error of a number or a hidden state, of which the leading numbers of the target count."""
        losses = []
        for name, target in self.targets.items():
            found = outputs[name]
            found = found.to(torch.promote_types(found.dtype, torch.float32))
            if self._is_number(name, found):
                each = (found - target[..., : found.shape[-1]].to(found.dtype)).pow(2).mean(-1) / 2
            elif self._is_several(name, found):
                function = torch.nn.functional.binary_cross_entropy_with_logits
                each = function(found, target.to(found.dtype), reduction="none").mean(-1)
            else:
                classes = target.flatten(0, -2) if target.dim() == found.dim() else target.flatten()
                flat = torch.nn.functional.cross_entropy(found.flatten(0, -2), classes, reduction="none")
                each = flat.view(found.shape[:-1])
            losses.append(self._mean(each))
        return torch.stack(losses).mean()

    def _names(self, outputs: Mapping[str, Any]) -> list[str]:
        names = [name for name in _PREDICTIONS if isinstance(outputs.get(name), Tensor)]
        if not names and isinstance(outputs.get("last_hidden_state"), Tensor):
            names = ["last_hidden_state"]
        if not names:
            raise MLFSError(
                f"batches without labels need a model that gives logits or last_hidden_state, not {sorted(outputs)}: "
                "give batches with labels, or order by 'activation' or 'magnitude'"
            )
        return names

    def _draw(self, name: str, values: Tensor, generator: torch.Generator | None) -> Tensor:
        wide = values.to("cpu", torch.promote_types(values.dtype, torch.float32))
        if generator is None:
            drawn = wide
            if self._is_several(name, values):
                drawn = wide.sigmoid()
            elif not self._is_number(name, values):
                drawn = wide.softmax(-1)
        elif self._is_number(name, values):
            spread = wide.std() if wide.numel() > 1 else torch.ones(())
            noise = torch.randn(wide.shape, generator=generator, dtype=wide.dtype)
            drawn = wide + noise * spread.clamp_min(torch.finfo(wide.dtype).tiny)
        elif self._is_several(name, values):
            drawn = (torch.rand(wide.shape, generator=generator) < wide.sigmoid()).to(wide.dtype)
        else:
            chances = wide.softmax(-1).flatten(0, -2)
            drawn = torch.multinomial(chances, 1, generator=generator).view(wide.shape[:-1])
        return drawn.to(values.device)

    def _is_number(self, name: str, values: Tensor) -> bool:
        """Whether an output is a number, or numbers, as such."""
        alone = name == "logits" and (values.shape[-1] == 1 or self.problem_type == "regression")
        return alone or name == "last_hidden_state"

    def _is_several(self, name: str, values: Tensor) -> bool:
        """Whether each output says yes or no by itself."""
        return name == "logits" and values.dim() == 2 and self.problem_type == "multi_label_classification"

    def _mean(self, each: Tensor) -> Tensor:
        """Takes the mean over rows, and over the tokens that are no padding where there are some."""
        mask = self.attention_mask
        if mask is None or mask.shape != each.shape:
            return each.mean()
        counts = mask.to(each.device, each.dtype)
        return (each * counts).sum() / counts.sum().clamp_min(1)
