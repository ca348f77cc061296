"""Language models without logits: the head over the vocabulary (the LM head) is left out of the forward pass, so that
its loss can be computed from what goes into it (`mlfs.ops.head_loss`). Everything else of the model runs as ever."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_MASKED_LM_MAPPING_NAMES
from transformers.utils import ModelOutput

from mlfs.elastic.linear import ElasticLinear
from mlfs.ops.head_loss import as_head_input

HEAD_INPUT = "head_input"  # among the outputs of a model without logits: (batch, tokens, hidden size)


def vocabulary_head(model: PreTrainedModel) -> ElasticLinear | None:
    """Finds the layer whose outputs are the logits of a causal or masked language model.

    Returns:
        The layer; None where there is no such layer, where the model does more to its logits (scales or caps them), or
        has a loss of its own.
    """
    names = [*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values(), *MODEL_FOR_MASKED_LM_MAPPING_NAMES.values()]
    if type(model).__name__ not in names or "_loss_function" in vars(model):
        return None
    head = model.get_output_embeddings()
    if not isinstance(head, ElasticLinear) or head.stages or head.transposed:
        return None
    if "forward" in vars(head):  # somebody has put another in its place
        return None
    return head if _gives_the_logits(head, model) else None


def without_logits(model: nn.Module, head: ElasticLinear, inputs: Mapping[str, Any]) -> ModelOutput:
    """Runs a model without its head.

    Args:
        model: the model, or what wraps it.
        head: the model's `vocabulary_head`.
        inputs: of the model; labels among them are not used.

    Returns:
        What the model gives for `inputs`, with what goes into its head, HEAD_INPUT, instead of loss and logits.
    """
    head_inputs: list[Tensor] = []

    def keep_input(_: nn.Module, args: tuple[Tensor], options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        head_input = as_head_input(args[0])
        head_inputs.append(head_input)
        # Of all columns of the logits one is made, and not used: a layer cannot be told to make none.
        return (head_input,), {**options, "out_features": 1}

    hook = head.register_forward_pre_hook(keep_input, with_kwargs=True)
    try:
        outputs = model(**{name: value for name, value in inputs.items() if name != "labels"})
    finally:
        hook.remove()
    (head_input,) = head_inputs
    kept = {name: value for name, value in outputs.items() if name != "logits"}
    return ModelOutput({**kept, HEAD_INPUT: head_input})


@torch.no_grad()
def _gives_the_logits(head: ElasticLinear, model: PreTrainedModel) -> bool:
    """Tries out, on two tokens, whether the model hands on what its head gives as it is."""
    head_outputs: list[Tensor] = []
    modes = [(module, module.training) for module in model.modules()]
    hook = head.register_forward_hook(lambda module, args, output: head_outputs.append(output))
    try:
        model.eval()  # draws no random numbers
        logits = model(input_ids=torch.zeros(1, 2, dtype=torch.int64, device=model.device)).logits
    finally:
        hook.remove()
        for module, mode in modes:
            module.training = mode
    return len(head_outputs) == 1 and torch.equal(logits, head_outputs[0])
