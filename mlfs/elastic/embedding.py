"""An embedding table whose leading columns are read, with low-rank stages."""

import torch
from torch import Tensor, nn

from mlfs.elastic.base import Axes, OutputPart, wants_gradient
from mlfs.elastic.staged import Staged
from mlfs.errors import MLFSError
from mlfs.space.dimensions import LayerSizes


class ElasticEmbedding(Staged):
    """Looks up rows of an embedding table, cut to the leading columns: `features`, else the active subnet's, else all.

    With stages, token t becomes E[t, :n] + Σ_s c_s A_s[:, t]ᵀ B_s[:n]ᵀ: W = Eᵀ is the matrix that a one-hot row is
    multiplied with (`Staged`). By default there are none.

    >>> import torch
    >>> ElasticEmbedding.from_embedding(nn.Embedding(100, 64))(torch.tensor([[1, 2]]), features=48).shape
    torch.Size([1, 2, 48])
    """

    def __init__(
        self,
        embedding: nn.Embedding,
        train_base: bool = False,
        rank: int = 0,
        stages: int = 3,
        alpha: float = 16.0,
    ) -> None:
        super().__init__(embedding, nn.Embedding)
        self.num_embeddings, self.embedding_dim = embedding.num_embeddings, embedding.embedding_dim
        self.in_features, self.out_features = self.num_embeddings, self.embedding_dim
        self.padding_idx = embedding.padding_idx
        if embedding.max_norm is not None or embedding.sparse or embedding.scale_grad_by_freq:
            raise MLFSError("an embedding with max_norm, sparse or scale_grad_by_freq cannot be made elastic")
        self._add_stages(rank, stages, alpha)
        self._spread_tokens()
        self.train_base(train_base)
        self.train_stage(0 if self.stages else None)

    @classmethod
    def from_embedding(
        cls, embedding: nn.Embedding, train_base: bool = False, rank: int = 0, stages: int = 3, alpha: float = 16.0
    ) -> "ElasticEmbedding":
        """Makes an elastic layer on the storage of `embedding`; frozen unless `train_base`.

        Args:
            rank, stages, alpha: of the low-rank stages; rank 0 for none.

        Raises:
            MLFSError: an embedding, a rank or a number of stages that cannot be.
        """
        return cls(embedding, train_base, rank, stages, alpha)

    def forward(self, ids: Tensor, features: int | None = None) -> Tensor:
        """Looks up ids (...), integers: (..., features).

        Raises:
            MLFSError: more features than the table has.
        """
        width, weight = self._size(features, self.embedding_dim, "features"), self.own_weight
        if wants_gradient(weight):
            # cut afterwards: the gradient of a cut table is copied into one of the full width (MiniLM: 40 ms, not 7)
            y = nn.functional.embedding(ids, weight, self.padding_idx)[..., :width]
        else:
            y = nn.functional.embedding(ids, weight[:, :width], self.padding_idx)
        for stage in range(self.trained_stages):
            codes = nn.functional.embedding(ids, self.lora_A[stage].t(), self.padding_idx)  # (..., rank)
            y = y + self.scales[stage] * (codes @ self.lora_B[stage][:width].t()).to(y.dtype)
        return y

    def axes(self) -> Axes:
        return Axes(None, tuple(OutputPart(size, 0, self.embedding_dim) for size in self._extents))

    def extract_at(self, sizes: LayerSizes) -> nn.Module:
        return self.extract(self._extents[0](sizes))

    def extract(self, features: int | None = None) -> nn.Module:
        """Makes the plain nn.Embedding of one width, with a copy of the leading columns.

        Args:
            features: the width; by default what a call without it gives.

        Raises:
            MLFSError: more features than the table has.
        """
        width = self._size(features, self.embedding_dim, "features")
        module = self.plain(weight=self._table(width).detach().clone(memory_format=torch.contiguous_format))
        module.embedding_dim = width  # type: ignore[assignment]
        return module

    def merge_stages(self, stages: int) -> None:
        """Leaves the stages apart, after the checks that all layers make: a lookup adds some numbers to each token,
        where a merged table would be a copy of the whole vocabulary."""
        if not 0 <= stages <= self.stages:
            raise MLFSError(f"cannot merge {stages} of {self.stages} stages")

    def read_sizes(self, sizes: LayerSizes) -> tuple[int, int]:
        """Gives (columns, rows) of A and B that a subnet learns by: of A none, as a batch reads few tokens of all."""
        return 0, self._extents[0](sizes) if self._extents else self.embedding_dim

    def _computes_with_another(self, name: str) -> bool:
        return super()._computes_with_another(name) and (name != "weight" or self._is_cut() or self._has_effect())

    def _computed_at(self, name: str, own: Tensor, sizes: LayerSizes | None) -> Tensor:
        if name != "weight" or not self._has_effect():
            return super()._computed_at(name, own, sizes)
        return self._table(self._extents[0](sizes) if sizes is not None and self._extents else self.embedding_dim)

    def _table(self, width: int) -> Tensor:
        """The leading columns of the table with its stages, (entries, width)."""
        if not self.trained_stages:
            return self.own_weight[:, :width]
        return self.merged_weight(spans=[0, width]).t().to(self.own_weight.dtype)

    def _is_cut(self) -> bool:
        return self._scope is not None and self._scope.sizes is not self._scope.default

    def _has_effect(self) -> bool:
        return any(not b.is_meta and bool(b.detach().any()) for b in self.lora_B[: self.trained_stages])

    def _matrix(self) -> Tensor:
        return self.own_weight.t()

    def _spread_tokens(self) -> None:
        """Draws A anew, wider: of its many columns a token reads one alone, so that their number says nothing."""
        for a in self.lora_A:
            nn.init.uniform_(a, -(self.rank**-0.5), self.rank**-0.5)
