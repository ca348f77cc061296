"""What kind of outputs and labels a model has, and what depends on it."""

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from mlfs.ops.distill import divergence
from mlfs.ops.head_loss import IGNORED


class Task:
    """What the training of a super-transformer has to know of its outputs and labels. `task_of` finds a model's."""

    # Whether the model divides its loss by the number of labels it is told of (`num_items_in_batch`). The losses of all
    # but causal language models are means over the batch, whatever number they are told.
    divides_by_items = False

    def targets(self, labels: Tensor) -> Tensor:
        """Returns the label of each output, of the shape of `labels`."""
        return labels

    def targets_in(self, inputs: Mapping[str, Any]) -> Tensor | None:
        """Returns the label of each output of a batch; None where it has no labels, or none that are a tensor."""
        if isinstance(shifted := inputs.get("shift_labels"), Tensor):
            return shifted
        labels = inputs.get("labels")
        return self.targets(labels) if isinstance(labels, Tensor) else None

    def unlabelled(self, inputs: Mapping[str, Any]) -> Tensor | None:
        """Tells whether no label of a batch counts, as a bool scalar; None where every label counts."""
        targets = self.targets_in(inputs)
        if targets is None or targets.is_floating_point():
            return None
        return targets.eq(IGNORED).all()

    def compares(self, outputs: Mapping[str, Any]) -> bool:
        """Tells whether a model gives outputs that `divergence` can compare."""
        return "logits" in outputs

    def divergence(
        self,
        student: Mapping[str, Any],
        teacher: Mapping[str, Any],
        inputs: Mapping[str, Any],
        temperature: float = 1.0,
    ) -> Tensor:
        """Measures how far a student's outputs are from its teacher's.

        Args:
            student, teacher: model outputs. The teacher's are constants.
            inputs: of the batch. Tokens whose label is ignored, or that are padding, do not count.
            temperature: of the KL divergence.

        Returns:
            A scalar, a mean over what counts.
        """
        raise NotImplementedError


class Classification(Task):
    """One softmax over classes for each sequence or token: classifiers and masked language models."""

    def divergence(
        self,
        student: Mapping[str, Any],
        teacher: Mapping[str, Any],
        inputs: Mapping[str, Any],
        temperature: float = 1.0,
    ) -> Tensor:
        """Measures the KL divergence of the classes; see `Task.divergence`."""
        mask = self.token_mask(student["logits"], inputs)
        student_logits, teacher_logits = (self.predictions(outputs["logits"]) for outputs in (student, teacher))
        return divergence(student_logits, teacher_logits, mask, temperature)

    def predictions(self, logits: Tensor) -> Tensor:
        """Returns the logits that have a label."""
        return logits

    def token_mask(self, logits: Tensor, inputs: Mapping[str, Any]) -> Tensor | None:
        """Finds which predictions count.

        Args:
            logits: (..., classes), of the whole batch.
            inputs: of the batch; of these, labels and attention_mask where their shape is (...).

        Returns:
            Booleans of the predictions' shape: whose label is not ignored; without labels, those that are no padding.
            None if all count.
        """
        labels, attention = inputs.get("labels"), inputs.get("attention_mask")
        shape = logits.shape[:-1]
        if isinstance(labels, Tensor) and labels.shape == shape:
            return labels.ne(IGNORED)
        if attention is not None and attention.shape == shape:
            return attention.bool()
        return None


class CausalLanguageModeling(Classification):
    """A softmax over the vocabulary for each token, whose label is the next token."""

    divides_by_items = True

    def targets(self, labels: Tensor) -> Tensor:
        """Returns the label of each output, the next token's: (batch, tokens); the last one is ignored."""
        return nn.functional.pad(labels, (0, 1), value=IGNORED)[..., 1:]

    def predictions(self, logits: Tensor) -> Tensor:
        """Returns the logits that have a label: (batch, tokens - 1, vocabulary)."""
        return logits[:, :-1]

    def token_mask(self, logits: Tensor, inputs: Mapping[str, Any]) -> Tensor | None:
        """Finds which predictions count, (batch, tokens - 1); see `Classification.token_mask`."""
        mask = super().token_mask(logits, inputs)
        return None if mask is None else mask[:, 1:]


class Regression(Task):
    """Numbers: the mean squared difference stands in for a divergence."""

    def divergence(
        self,
        student: Mapping[str, Any],
        teacher: Mapping[str, Any],
        inputs: Mapping[str, Any],
        temperature: float = 1.0,
    ) -> Tensor:
        """Measures the mean squared difference; see `Task.divergence`."""
        difference = student["logits"].float() - teacher["logits"].detach().float()
        return difference.pow(2).mean()


class MultiLabelClassification(Task):
    """A sigmoid for each label."""

    def divergence(
        self,
        student: Mapping[str, Any],
        teacher: Mapping[str, Any],
        inputs: Mapping[str, Any],
        temperature: float = 1.0,
    ) -> Tensor:
        """Measures the KL divergence of each label being there or not; see `Task.divergence`."""
        student_pairs, teacher_pairs = (_with_zero(outputs["logits"]) for outputs in (student, teacher))
        return divergence(student_pairs, teacher_pairs, None, temperature)


class QuestionAnswering(Task):
    """A softmax over the tokens for the start of the answer, and one for its end."""

    def unlabelled(self, inputs: Mapping[str, Any]) -> Tensor | None:
        """Tells whether all starts, or all ends, are beyond the tokens, where they do not count."""
        ends = [inputs.get(name) for name in ("start_positions", "end_positions")]
        tokens = inputs.get("input_ids", inputs.get("inputs_embeds"))
        if tokens is None or any(end is None for end in ends):
            return None
        start, end = (end.ge(tokens.shape[1]).all() for end in ends if end is not None)
        return start | end

    def compares(self, outputs: Mapping[str, Any]) -> bool:
        """Tells whether a model gives the logits of both ends."""
        return "start_logits" in outputs

    def divergence(
        self,
        student: Mapping[str, Any],
        teacher: Mapping[str, Any],
        inputs: Mapping[str, Any],
        temperature: float = 1.0,
    ) -> Tensor:
        """Measures the mean KL divergence of start and end; see `Task.divergence`."""
        start, end = (
            divergence(student[name], teacher[name], None, temperature) for name in ("start_logits", "end_logits")
        )
        return (start + end) / 2


def _with_zero(logits: Tensor) -> Tensor:
    """Returns (batch, labels, 2) of logits (batch, labels): a sigmoid is a softmax over the logit and zero."""
    return torch.stack([logits, torch.zeros_like(logits)], dim=-1)


def is_a_number_per_label(labels: Tensor) -> bool:
    """Tells whether each row has a number for every label: (batch, labels), and no integers."""
    return labels.dim() == 2 and labels.dtype not in (torch.int64, torch.int32)


def task_of(model: PreTrainedModel, labels: Tensor | None = None) -> Task:
    """Finds the task of a model, from its class and configuration.

    Args:
        model: whose configuration may leave the kind of problem to the labels, as transformers does: integers are one
            class of each row, other numbers are a label each. `problem_type` in the configuration says otherwise.
        labels: of a batch.
    """
    if type(model).__name__ in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
        return CausalLanguageModeling()
    if "start_positions" in inspect.signature(model.forward).parameters:
        return QuestionAnswering()
    problem = getattr(model.config, "problem_type", None)
    if problem == "regression" or (problem is None and getattr(model.config, "num_labels", 2) == 1):
        return Regression()
    if problem is None and labels is not None and is_a_number_per_label(labels):
        problem = "multi_label_classification"
    if problem == "multi_label_classification":
        return MultiLabelClassification()
    return Classification()
