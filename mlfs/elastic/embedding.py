"""An embedding table whose leading columns are read."""

from torch import Tensor, nn

from mlfs.elastic.base import Axes, Elastic, OutputPart, wants_gradient
from mlfs.errors import MLFSError
from mlfs.space.dimensions import LayerSizes


class ElasticEmbedding(Elastic):
    """Looks up rows of an embedding table, cut to the leading columns: `features`, else the active subnet's, else all.

    >>> import torch
    >>> ElasticEmbedding.from_embedding(nn.Embedding(100, 64))(torch.tensor([[1, 2]]), features=48).shape
    torch.Size([1, 2, 48])
    """

    def __init__(self, embedding: nn.Embedding, train_base: bool = False) -> None:
        super().__init__(embedding, nn.Embedding)
        self.num_embeddings, self.embedding_dim = embedding.num_embeddings, embedding.embedding_dim
        self.padding_idx = embedding.padding_idx
        if embedding.max_norm is not None or embedding.sparse or embedding.scale_grad_by_freq:
            raise MLFSError("an embedding with max_norm, sparse or scale_grad_by_freq cannot be made elastic")
        self.train_base(train_base)

    @classmethod
    def from_embedding(cls, embedding: nn.Embedding, train_base: bool = False) -> "ElasticEmbedding":
        """Makes an elastic layer on the storage of `embedding`; frozen unless `train_base`."""
        return cls(embedding, train_base)

    def forward(self, ids: Tensor, features: int | None = None) -> Tensor:
        """Looks up ids (...), integers: (..., features).

        Raises:
            MLFSError: more features than the table has.
        """
        width, weight = self._size(features, self.embedding_dim, "features"), self.own_weight
        if wants_gradient(weight):
            # cut afterwards: the gradient of a cut table is copied into one of the full width (MiniLM: 40 ms, not 7)
            return nn.functional.embedding(ids, weight, self.padding_idx)[..., :width]
        return nn.functional.embedding(ids, weight[:, :width], self.padding_idx)

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
        module = self.plain(weight=self.own_weight.detach()[:, :width].clone())
        module.embedding_dim = width  # type: ignore[assignment]
        return module
