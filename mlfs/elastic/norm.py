"""Norms over however many numbers their input has."""

import torch
from torch import Tensor, nn

from mlfs.elastic.base import Axes, Elastic, OutputPart
from mlfs.errors import MLFSError
from mlfs.ops.layer import Norm
from mlfs.ops.norm import add_norm
from mlfs.space.dimensions import LayerSizes


class ElasticNorm(Elastic):
    """Holds what the norms share."""

    eps: float
    rms: bool
    statistics: torch.dtype | None = None  # the type they are taken in, where it is not x's or wider

    def forward(self, x: Tensor) -> Tensor:
        """Normalises the leading n numbers: (..., n) -> (..., n)."""
        return self.after(x)[0]

    def axes(self) -> Axes:
        sizes = self._extents  # one, or none while it follows no subnet
        own = self._own("weight")
        width = own.shape[0] if own is not None else 0
        return Axes(sizes[0] if sizes else None, tuple(OutputPart(size, 0, width) for size in sizes))

    def after(self, x: Tensor, residual: Tensor | None = None, p: float = 0.0) -> tuple[Tensor, Tensor]:
        """Computes (norm(s), s) of s = residual + dropout(x), each (..., n).

        Args:
            residual: (..., n), or None for nothing.
            p: probability of dropout.

        Raises:
            MLFSError: x wider than the norm, or a p that is no probability below 1.
        """
        own = self._own("weight")
        if own is not None and x.shape[-1] > own.shape[0]:
            raise MLFSError(f"input of width {x.shape[-1]}, expected at most {own.shape[0]}")
        rows = self._row_sizes()
        if rows is None:
            return self._norm(x, residual, p)
        total = nn.functional.dropout(x, p)
        if residual is not None:
            total = residual + total
        parts = []  # of each row the leading numbers that it has, zeros after them
        for start, end, sizes in rows.runs(total.shape[0]):
            width = self._extents[0](sizes)
            y, _ = self._norm(total[start:end, ..., :width])
            parts.append(nn.functional.pad(y, (0, total.shape[-1] - width)))
        if len(parts) == 1:
            return parts[0], total
        return torch.cat(parts), total

    def reads_now(self) -> Norm:
        """Gives the norm as operators take it."""
        return Norm(self._own("weight"), self._own("bias"), self.eps, self.rms)

    def extract_at(self, sizes: LayerSizes) -> nn.Module:
        return self.extract(self._extents[0](sizes))

    def extract(self, features: int | None = None) -> nn.Module:
        """Makes the plain norm over `features` numbers, of the class this one was made from, with copies of its own.

        Args:
            features: the width; by default the active subnet's where the layer follows one, else the full one.

        Raises:
            MLFSError: more features than the norm has.
        """
        width = self._size(features, self._full_width(), "features")
        module = self.plain(**{name: _leading(value, width) for name, value in self._parameters.items()})
        if hasattr(module, "normalized_shape"):
            module.normalized_shape = (width,)  # type: ignore[assignment]
        return module

    def _full_width(self) -> int:
        return self.own_weight.shape[0]

    def _norm(self, x: Tensor, residual: Tensor | None = None, p: float = 0.0) -> tuple[Tensor, Tensor]:
        return add_norm(x, residual, self.reads_now(), p, statistics=self.statistics)


class ElasticLayerNorm(ElasticNorm):
    """Applies LayerNorm over as many numbers as the input has, with the leading ones of weight and bias.

    >>> ElasticLayerNorm.from_layer_norm(nn.LayerNorm(64))(torch.randn(2, 48)).shape
    torch.Size([2, 48])
    """

    rms = False

    def __init__(self, norm: nn.LayerNorm, train_base: bool = False) -> None:
        super().__init__(norm, nn.LayerNorm)
        if len(norm.normalized_shape) != 1:
            raise MLFSError(f"normalized_shape={norm.normalized_shape}: only the last axis can be elastic")
        self.eps, self.normalized_shape = norm.eps, norm.normalized_shape
        self.train_base(train_base)

    @classmethod
    def from_layer_norm(cls, norm: nn.LayerNorm, train_base: bool = False) -> "ElasticLayerNorm":
        """Makes an elastic layer on the storage of `norm`; frozen unless `train_base`."""
        return cls(norm, train_base)

    def _full_width(self) -> int:
        return self.normalized_shape[0]


class ElasticRMSNorm(ElasticNorm):
    """Applies RMSNorm over as many numbers as the input has, with the leading ones of the weight.

    Made from torch's nn.RMSNorm or a transformers one (any module with `weight` and `variance_epsilon` or `eps`).

    >>> ElasticRMSNorm.from_rms_norm(nn.RMSNorm(64, eps=1e-6))(torch.randn(2, 48)).shape
    torch.Size([2, 48])
    """

    rms = True

    def __init__(self, norm: nn.Module, train_base: bool = False) -> None:
        super().__init__(norm)
        if self._own("weight") is None or self.own_weight.dim() != 1:
            raise MLFSError("an RMSNorm needs a weight over the last axis to be made elastic")
        eps = getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
        self.eps: float = torch.finfo(self.own_weight.dtype).eps if eps is None else eps
        self.statistics = None if isinstance(norm, nn.RMSNorm) else torch.float32  # transformers: whatever x is
        self.train_base(train_base)

    @classmethod
    def from_rms_norm(cls, norm: nn.Module, train_base: bool = False) -> "ElasticRMSNorm":
        """Makes an elastic layer on the storage of `norm`; frozen unless `train_base`."""
        return cls(norm, train_base)


def _leading(parameter: Tensor | None, width: int) -> Tensor | None:
    """A copy of the leading numbers of a parameter."""
    if parameter is None:
        return None
    return parameter.detach()[:width].clone()
