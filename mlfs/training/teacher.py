"""`FrozenTeacher`: the whole model as it was before widths and depths trained, which teaches every size, maxnet too.

Maxnet teaches the others in the method (arXiv 2404.01353), and changes with them: where large updates of shared weights
disturb it, all sizes learn from what is disturbed. A frozen teacher stays what it was, at the price of a copy of the
weights and a forward pass more a step.
"""

from collections.abc import Mapping
from typing import Any

import torch
from transformers import PreTrainedModel

from mlfs.elastic.linear import ElasticLinear
from mlfs.models.configuration import dimensions
from mlfs.models.fused.lm_head import vocabulary_head, without_logits
from mlfs.space.search_space import SearchSpace
from mlfs.supernet.model import SuperTransformer


class FrozenTeacher:
    """Holds a copy of maxnet as it is now, in evaluation mode.

    Args:
        supernet: whose units are in the order that they will have.
    """

    def __init__(self, supernet: SuperTransformer) -> None:
        plain = supernet.extract(supernet.space.max)
        sizes = dimensions(plain.config, supernet.family)
        space = SearchSpace((sizes.hidden,), (sizes.heads,), (sizes.ffn,), (sizes.layers,))
        # elastic, to run on the same kernels, and without padding as the others do
        copied = SuperTransformer(plain, space, rank=0, base_name="")
        self.model: PreTrainedModel = copied.model.eval().requires_grad_(False)  # type: ignore[assignment]
        self._supernet = copied
        self.head = vocabulary_head(self.model)

    @torch.no_grad()
    def __call__(self, inputs: Mapping[str, Any], needs_states: bool, leaves_head_out: bool) -> Mapping[str, Any]:
        """Runs the teacher on a batch.

        Args:
            inputs: of the model, without labels.
            needs_states: whether hidden states are wanted.
            leaves_head_out: whether what goes into the LM head is wanted instead of logits.
        """
        given = dict(inputs) | ({"output_hidden_states": True} if needs_states else {})
        if leaves_head_out and self.head is not None:
            return without_logits(self.model, self.head, given)
        return self.model(**given)  # type: ignore[no-any-return]

    def has_head_of(self, head: ElasticLinear) -> bool:
        """Tells whether a head has the weights of the teacher's: logits of both can then be made by one."""
        if self.head is None:
            return False
        ours, theirs = ([p for p in (h.own_weight, h.own_bias) if p is not None] for h in (self.head, head))
        return all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))
