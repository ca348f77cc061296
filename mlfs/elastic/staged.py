"""What layers with low-rank stages share: their adapters, which of them train, and which are merged."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mlfs.elastic.base import Elastic
from mlfs.errors import MLFSError


class Staged(Elastic):
    """Holds W (out, in) with low-rank stages: W + Σ_s c_s B_s A_s, of which a subnet reads leading rows and columns.

    Attributes:
        out_features, in_features: the sizes of W, as a layer that multiplies rows with its transpose has them.
        lora_A, lora_B: of each stage (rank, in) and (out, rank), in fp32 or wider. B starts at zero.
        trained_stages: how many stages may have an effect; later ones have B = 0 and cost nothing.
        merged_stages: how many are read from a merged copy.
    """

    in_features: int
    out_features: int

    def _add_stages(self, rank: int, stages: int, alpha: float) -> None:
        """Makes the stages; the scale is c_s = alpha / rank, as in LoRA (arXiv 2106.09685).

        Raises:
            MLFSError: a rank or a number of stages that the layer cannot have.
        """
        if rank < 0 or stages < 0 or rank > min(self.in_features, self.out_features):
            raise MLFSError(
                f"rank={rank}, stages={stages} for a {self.out_features} x {self.in_features} layer: "
                f"expected 0 <= rank <= {min(self.in_features, self.out_features)} and stages >= 0; choose a lower rank"
            )
        self.rank, self.stages, self.merged_stages = rank, stages if rank else 0, 0
        # Adapters stay in fp32 over a half-precision base: their updates are small.
        dtype = torch.promote_types(self.own_weight.dtype, torch.float32)
        like: dict[str, Any] = {"dtype": dtype, "device": self.own_weight.device}
        self.lora_A = nn.ParameterList(
            nn.init.kaiming_uniform_(torch.empty(rank, self.in_features, **like), a=math.sqrt(5))
            for _ in range(self.stages)
        )
        self.lora_B = nn.ParameterList(torch.zeros(self.out_features, rank, **like) for _ in range(self.stages))
        self.scales = [alpha / max(rank, 1)] * self.stages
        self.trained_stages = min(self.stages, 1)  # later stages have B = 0 and cost nothing
        self.register_buffer("_merged", None, persistent=False)

    def train_stage(self, stage: int | None) -> None:
        """Lets only the adapters of `stage` train, or, for None, those of no stage.

        Raises:
            MLFSError: a stage that the layer does not have, or that is merged.
        """
        if stage is not None and not 0 <= stage < self.stages:
            raise MLFSError(f"stage={stage}: this layer has stages 0 to {self.stages - 1}")
        if stage is not None and stage < self.merged_stages:
            raise MLFSError(f"stage {stage} is merged: merge at most {stage} stages to train it")
        for s in range(self.stages):
            self.lora_A[s].requires_grad_(s == stage)
            self.lora_B[s].requires_grad_(s == stage)
        if stage is not None:
            self.trained_stages = max(self.trained_stages, stage + 1)

    def forget_idle_stages(self) -> None:
        """Leaves the last stages out of the computation, as far as they have no effect and do not train."""
        while self.trained_stages > max(self.stages_begun(), self.merged_stages):
            if self.lora_B[self.trained_stages - 1].any():
                return
            self.trained_stages -= 1

    @torch.no_grad()
    def merge_stages(self, stages: int) -> None:
        """Reads the first `stages` stages from one merged matrix beside the untouched W, or, for 0, reads W again.

        The matrix is in fp32 or wider: in a half-precision base's own type, small updates would be lost.

        Raises:
            MLFSError: stages that the layer does not have, or a base that trains.
        """
        if not 0 <= stages <= self.stages:
            raise MLFSError(f"cannot merge {stages} of {self.stages} stages")
        if stages and self.own_weight.requires_grad:
            raise MLFSError("the base trains: it cannot be read from a merged copy; freeze it, or do not merge")
        self.merged_stages, self._merged = 0, None
        if stages:
            adds = any(b.any() for b in self.lora_B[: min(stages, self.trained_stages)])
            is_wide = self.own_weight.dtype == torch.promote_types(self.own_weight.dtype, torch.float32)
            # a copy only of what differs: nothing does where the base trained in these stages
            self._merged = self.merged_weight(stages) if adds or not is_wide else self._matrix().detach()
            self.merged_stages = stages

    def merged_weight(self, stages: int | None = None, columns: int | None = None, spans: Sequence[int] = ()) -> Tensor:
        """Computes (W + Σ_{s < stages} c_s B_s A_s)[rows, :columns], in the adapters' type.

        Args:
            stages: how many of the stages that trained are added; all by default.
            columns: all by default. spans: the rows, as flat (start, length) pairs; all by default.
        """
        if columns is None:
            columns = self.in_features
        spans = spans or [0, self.out_features]
        pairs = zip(spans[::2], spans[1::2], strict=True)
        rows = torch.cat([torch.arange(start, start + length) for start, length in pairs]).to(self.own_weight.device)
        dtype = torch.promote_types(self.own_weight.dtype, torch.float32)
        merged = self._matrix()[:, :columns].index_select(0, rows).to(dtype)  # (rows, columns)
        trained = list(zip(self.lora_A, self.lora_B, self.scales, strict=True))[: self.trained_stages]
        for lora_a, lora_b, scale in trained[:stages]:
            # in a model that was moved to bf16, adapters are so, too
            b, a = lora_b.index_select(0, rows).to(dtype), lora_a[:, :columns].to(dtype)
            merged = torch.addmm(merged, b, a, alpha=scale)
        return merged

    def _computes_with_another(self, name: str) -> bool:
        return super()._computes_with_another(name) or (name == "weight" and self.trained_stages > 0)

    def adapter_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Gives (name, tensor) of every stage's A and B."""
        yield from self.lora_A.named_parameters("lora_A")
        yield from self.lora_B.named_parameters("lora_B")

    def stages_begun(self) -> int:
        """Counts the stages up to the last one that trains now."""
        return max((s + 1 for s, b in enumerate(self.lora_B) if b.requires_grad), default=0)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Loads weight and bias, and counts the stages that have an effect; their own tensors load after this."""
        super()._load_from_state_dict(state_dict, prefix, *args)
        self.merge_stages(0)  # a merged copy would be that of what was here before
        trained = self.stages_begun()
        for s in range(self.stages):
            b = state_dict.get(f"{prefix}lora_B.{s}")
            has_effect = s < self.trained_stages if b is None or b.is_meta else bool(b.any())
            if has_effect:
                trained = max(trained, s + 1)
        self.trained_stages = trained

    def _matrix(self) -> Tensor:
        """W (out, in), a view."""
        raise NotImplementedError


def train_stage(module: nn.Module, stage: int | None) -> None:
    """Lets the adapters of one stage train in every elastic layer of `module`, or, for None, those of no stage."""
    for layer in module.modules():
        if isinstance(layer, Staged) and layer.stages:
            layer.train_stage(stage)
