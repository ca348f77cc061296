"""Language models without logits: the head over the vocabulary is left out of the forward pass, and its loss computed
from what goes into it (`mlfs.ops.head_loss`). Everything else of the model runs as ever."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_MASKED_LM_MAPPING_NAMES
from transformers.utils import ModelOutput

from mlfs.elastic.linear import ElasticLinear
from mlfs.ops.backend import in_autocast_type

HEAD_INPUT = "head_input"  # among the outputs of a model without logits: (batch, tokens, hidden)


def vocabulary_head(model: PreTrainedModel) -> ElasticLinear | None:
    """The layer whose outputs are the logits of a causal or masked language model; None where there is no such layer,
    where the model does more to its logits (scales or caps them), or has a loss of its own."""
    names = [*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values(), *MODEL_FOR_MASKED_LM_MAPPING_NAMES.values()]
    if type(model).__name__ not in names or "_loss_function" in vars(model):
        return None
    head = model.get_output_embeddings()
    if not isinstance(head, ElasticLinear) or head.stages or head.transposed or "forward" in vars(head):
        return None
    return head if _gives_the_logits(head, model) else None


def without_logits(model: nn.Module, head: ElasticLinear, inputs: Mapping[str, Any]) -> ModelOutput:
    """What the model gives for `inputs`, with what goes into its head (HEAD_INPUT) instead of loss and logits."""
    given: list[Tensor] = []

    def forward(x: Tensor) -> Tensor:
        given.append(in_autocast_type(x))
        return x[..., :0]

    head.__dict__["forward"] = forward  # hides the method of this one layer
    try:
        outputs = model(**{key: value for key, value in inputs.items() if key != "labels"})
    finally:
        del head.__dict__["forward"]
    (x,) = given
    return ModelOutput({**{key: value for key, value in outputs.items() if key != "logits"}, HEAD_INPUT: x})


@torch.no_grad()
def _gives_the_logits(head: ElasticLinear, model: PreTrainedModel) -> bool:
    """Tried out on two tokens."""
    given: list[Tensor] = []
    modes = [(module, module.training) for module in model.modules()]
    hook = head.register_forward_hook(lambda module, args, output: given.append(output))
    try:
        model.eval()  # draws no random numbers
        logits = model(input_ids=torch.zeros(1, 2, dtype=torch.int64, device=model.device)).logits
    finally:
        hook.remove()
        for module, mode in modes:
            module.training = mode
    return len(given) == 1 and torch.equal(logits, given[0])
