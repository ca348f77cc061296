"""What a subnet learns from maxnet's hidden states (`mlfs.ops.distill` has the formula)."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mlfs.errors import MLFSError
from mlfs.models.configuration import has_final_norm
from mlfs.ops.distill import feature_distance
from mlfs.supernet.model import SuperTransformer


class HiddenStateDistance(nn.Module):
    """Σ_l β_{g(l)} feature_{j,l} of a subnet j (arXiv 2404.01353, section 3), with one projection per maxnet layer.

    g(l) is the maxnet layer that the subnet's l-th layer is. A subnet reads the leading columns of the projections.

    Args:
        hidden_size, layers: of maxnet.
        betas: one weight, or one per maxnet layer.
        projection_size: numbers that a hidden state is projected to.
        learned: whether the projections train; else they are random and orthonormal.
        seed: of the projections.
        final_norm: whether the last hidden state that the model reports is a normalised one. Only maxnet's last is
            such a one too, so a subnet that ends at an earlier layer does not compare its last.

    Raises:
        MLFSError: a number of weights that is neither one nor that of the layers.
    """

    def __init__(
        self,
        hidden_size: int,
        layers: int,
        betas: Sequence[float],
        projection_size: int = 64,
        learned: bool = False,
        seed: int = 0,
        final_norm: bool = False,
    ) -> None:
        super().__init__()
        if len(betas) not in (1, layers):
            raise MLFSError(f"distill_beta has {len(betas)} values: expected one, or one for each of {layers} layers")
        self.layers, self.final_norm = layers, final_norm
        self.betas = tuple(betas)
        if len(betas) == 1:
            self.betas = self.betas * layers
        generator = torch.Generator().manual_seed(seed)
        size = min(projection_size, hidden_size)
        self.projections = nn.ParameterList()
        for _ in range(layers):
            columns = torch.linalg.qr(torch.randn(hidden_size, size, generator=generator))[0]
            projection = columns.t().contiguous()  # (size, hidden_size)
            self.projections.append(nn.Parameter(projection, requires_grad=learned))

    @property
    def is_used(self) -> bool:
        """Whether any layer is compared, and hidden states are needed."""
        return any(self.betas)

    def forward(
        self,
        kept: Sequence[int],
        student: Mapping[str, Any],
        teacher: Mapping[str, Any],
        attention_mask: Tensor | None = None,
        layer_shares: Tensor | None = None,
    ) -> Tensor:
        """Sums the weighted distances of the layers.

        Args:
            kept: the layers of the subnet.
            student: its outputs, with hidden_states: of each (batch, tokens, its hidden size), or
                (1, tokens that are no padding, hidden size) of an encoder that ran without padding.
            teacher: outputs of maxnet, with hidden_states.
            attention_mask: (batch, tokens); padding does not count.
            layer_shares: (layers of maxnet,), what each layer's distance is multiplied by; None for 1.

        Returns:
            A scalar; zero where no layer is compared.
        """
        student_states, teacher_states = student["hidden_states"], teacher["hidden_states"]
        total = student_states[0].new_zeros(())
        for i, layer in enumerate(kept):
            if not self._compares(kept, i):
                continue
            # state 0 is what goes into the first layer
            student_state, teacher_state = student_states[i + 1], teacher_states[layer + 1]
            if student_state.shape[:-1] != teacher_state.shape[:-1]:
                # the last state of a model that ran without padding has it again
                student_state = _without_padding(student_state, attention_mask)
                teacher_state = _without_padding(teacher_state, attention_mask)
            mask = attention_mask
            if mask is not None and mask.shape != student_state.shape[:-1]:
                mask = None
            distance = feature_distance(student_state, teacher_state, self.projections[layer], mask)
            if layer_shares is not None:
                distance = distance * layer_shares[layer]
            total = total + self.betas[layer] * distance
        return total

    @torch.no_grad()
    def sizes(self, teacher: Mapping[str, Any], attention_mask: Tensor | None = None) -> Tensor:
        """Computes what the distance of each layer is relative to, Σ ‖h_teacher · Pᵀ‖²: (layers,), fp32 or wider.

        Arguments: as of `forward`. Zero for layers that are not compared.
        """
        found = []
        for layer, state in enumerate(teacher["hidden_states"][1:]):
            dtype = torch.promote_types(state.dtype, torch.float32)
            size = torch.zeros((), dtype=dtype, device=state.device)
            if self.betas[layer]:
                squares = (state @ self.projections[layer].to(state.dtype).t()).to(dtype).pow(2).sum(-1)
                if attention_mask is not None and attention_mask.shape == squares.shape:
                    squares = squares.masked_fill(~attention_mask.bool(), 0)
                size = squares.sum()
            found.append(size)
        return torch.stack(found)

    def _compares(self, kept: Sequence[int], i: int) -> bool:
        """Whether the state after the subnet's i-th layer is compared."""
        layer = kept[i]
        ends_early = i == len(kept) - 1 and layer != self.layers - 1
        return bool(self.betas[layer]) and not (self.final_norm and ends_early)


def distance_of(supernet: SuperTransformer, args: Any, learned: bool = False) -> HiddenStateDistance:
    """Makes the distance between the hidden states of a super-transformer's sizes, where its model is.

    Args:
        args: the MLFSArguments.
        learned: whether its projections train.
    """
    dims = supernet.dimensions
    return HiddenStateDistance(
        dims.hidden,
        dims.layers,
        args.distill_beta,
        args.projection_size,
        learned=learned,
        seed=args.seed,
        final_norm=has_final_norm(supernet.family),
    ).to(supernet.model.device)


def _without_padding(states: Tensor, attention_mask: Tensor | None) -> Tensor:
    """Returns (1, tokens, n) of states (batch, length, n); states that are so already, as they are."""
    if attention_mask is not None and states.shape[:-1] == attention_mask.shape:
        return states[attention_mask.bool()].unsqueeze(0)
    return states.flatten(0, 1).unsqueeze(0)


def detached(outputs: Mapping[str, Any]) -> dict[str, Any]:
    """Returns model outputs without their graph, and without the key-value cache: what a teacher has to say."""

    def detach(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.detach()
        if isinstance(value, tuple):
            return tuple(detach(item) for item in value)
        return value

    return {key: detach(value) for key, value in outputs.items() if key != "past_key_values"}
