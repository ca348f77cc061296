"""A linear layer that reads the leading slice of a frozen W, with low-rank stages."""

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mlfs.elastic.base import Axes, OutputPart, wants_gradient
from mlfs.elastic.scope import Scope
from mlfs.elastic.source import check_source
from mlfs.elastic.staged import Staged
from mlfs.errors import MLFSError
from mlfs.ops.actions import linear as apply_linear
from mlfs.ops.grouped_linear import Group, grouped_sliced_linear, grouped_sliced_linear_reference
from mlfs.ops.layer import NOTHING, Epilogue, LowRankLinear
from mlfs.ops.observers import have_hooks
from mlfs.ops.sliced_linear import check_epilogue, finish
from mlfs.space.dimensions import AxisSize, LayerSizes, RowSizes
from mlfs.space.subnet import is_int


class ElasticLinear(Staged):
    """Computes y = x · W[:m, :n]ᵀ + b[:m] + Σ_s c_s (x · A_s[:, :n]ᵀ) B_s[:m]ᵀ for a Linear's own W (out, in) and b.

    The width n is that of x. The number of rows m is `out_features` of the call, else the active subnet's, else all.
    The low-rank stages (`lora_A[s]`: (rank, in), `lora_B[s]`: (out, rank)) start at zero effect: B_s = 0. Stage 0
    trains until `train_stage` says otherwise. The scale is c_s = alpha / rank, as in LoRA (arXiv 2106.09685).

    >>> layer = ElasticLinear.from_linear(nn.Linear(768, 3072), rank=8, stages=3)
    >>> layer(torch.ones(2, 5, 512), out_features=1536).shape
    torch.Size([2, 5, 1536])
    """

    def __init__(
        self, linear: nn.Module, rank: int = 8, stages: int = 3, alpha: float = 16.0, train_base: bool = False
    ) -> None:
        transposed = hasattr(linear, "nf")
        check_source(linear)
        if not (transposed or isinstance(linear, nn.Linear)) or not _is_floating(linear.weight):
            raise MLFSError(f"{type(linear).__name__}: expected an nn.Linear or a Conv1D of floating-point numbers")
        super().__init__(linear, _first_named(linear, "Conv1D") if transposed else nn.Linear)
        # transformers' Conv1D keeps W as (in, out); reading it through its strides makes the two alike.
        self.transposed = transposed
        self.out_features, self.in_features = self._matrix().shape
        self._add_stages(rank, stages, alpha)
        self._reads: AxisSize | None = None  # the axis of the input
        self.train_base(train_base)
        self.train_stage(0 if self.stages else None)
        self._parts: tuple[int, ...] = (self.out_features,)  # rows of each fused part at the full width

    @classmethod
    def from_linear(
        cls, linear: nn.Module, rank: int = 8, stages: int = 3, alpha: float = 16.0, train_base: bool = False
    ) -> "ElasticLinear":
        """Makes an elastic layer on the storage of `linear` (an nn.Linear, or transformers' Conv1D).

        Args:
            rank, stages, alpha: of the low-rank stages; rank 0 for none.
            train_base: whether W and b themselves train (for a network trained from scratch); else they are frozen.

        Raises:
            MLFSError: another kind of module, or a rank or a number of stages that the layer cannot have.
        """
        return cls(linear, rank, stages, alpha, train_base)

    def bind(self, scope: Scope, *extents: AxisSize, reads: AxisSize | None = None) -> None:
        """Lets the active subnet of `scope` give the sizes, along one axis for each fused part.

        Args:
            reads: the axis that the input follows; None where its width is fixed.

        Raises:
            MLFSError: axes that do not make up the layer at their full sizes.
        """
        super().bind(scope, *extents)
        self._reads = reads
        self._parts = tuple(extent(scope.default) for extent in extents) or (self.out_features,)
        columns, rows = self._columns(scope.default), sum(self._parts)
        if (rows, columns) != (self.out_features, self.in_features):
            raise MLFSError(
                f"a {self.out_features} x {self.in_features} projection, where the model's configuration makes it "
                f"{rows} x {columns}"
            )

    def forward(
        self,
        x: Tensor,
        out_features: int | None = None,
        activation: str = "none",
        operand: Tensor | None = None,
        residual: Tensor | None = None,
    ) -> Tensor:
        """Applies the layer, and what follows it: x (..., n) -> act(y) [· operand] + residual (..., m).

        Args:
            out_features: m, 1 to all; by default the active subnet's, else all.
            activation, operand, residual: see `mlfs.ops.layer.Epilogue`.

        Raises:
            MLFSError: x wider than the layer, an m that it does not have, or an operand that does not fit the
                activation.
        """
        if x.shape[-1] > self.in_features:
            raise MLFSError(f"input of width {x.shape[-1]}, expected at most in_features={self.in_features}")
        epilogue = NOTHING
        if activation != "none" or operand is not None or residual is not None:
            epilogue = Epilogue(activation, operand, residual)
        row_sizes = self._row_sizes()
        if row_sizes is not None and out_features is None:
            return finish(self._apply_to_rows(x, row_sizes), epilogue)
        weight: Any = self._own("weight")
        layer = self._read(weight, self.spans(out_features))
        return apply_linear(x, layer, epilogue, trains_base=wants_gradient(weight))

    def followed_by(
        self, x: Tensor, activation: str = "none", operand: Tensor | None = None, residual: Tensor | None = None
    ) -> Tensor:
        """Calls the layer with what follows it, as `forward` does; hooks of the layer see what the layer itself gives.

        Arguments, result and errors: as of `forward`.
        """
        if have_hooks(self):
            epilogue = Epilogue(activation, operand, residual)
            check_epilogue(epilogue)
            return finish(self(x), epilogue)
        return self(x, activation=activation, operand=operand, residual=residual)  # type: ignore[no-any-return]

    def _apply_to_rows(self, x: Tensor, row_sizes: RowSizes) -> Tensor:
        """Applies the layer to x (rows, ..., N), each row at sizes of its own: (rows, ..., M), zeros off a row's m."""
        grouped = grouped_sliced_linear
        if wants_gradient(self.own_weight):
            grouped = grouped_sliced_linear_reference
        flat = x.reshape(-1, x.shape[-1])  # (rows · tokens, N)
        layer = self._read(self.own_weight, [0, self.out_features])
        y = grouped(flat, layer, self._groups(x, row_sizes))
        return y.view(*x.shape[:-1], -1)

    def reads_now(self) -> LowRankLinear:
        """Gives the layer as it is read under the active subnet, as operators take it."""
        return self._read(self.own_weight, self.spans())

    def _read(self, weight: Tensor, spans: list[int]) -> LowRankLinear:
        matrix = self._merged
        if matrix is None:
            matrix = weight.t() if self.transposed else weight
        trained = slice(self.merged_stages, self.trained_stages)
        lora_a, lora_b = _values(self.lora_A)[trained], _values(self.lora_B)[trained]
        return LowRankLinear(matrix, self._own("bias"), lora_a, lora_b, self.scales[trained], spans)

    def for_operators(self) -> LowRankLinear | None:
        """Gives the layer as operators of several layers take it, or None where it must be called.

        It must be called where a gradient of its base is wanted, rows of the batch have sizes of their own, or hooks
        watch its calls.
        """
        weight = self.own_weight
        if have_hooks(self):
            return None
        if wants_gradient(weight) or self._row_sizes() is not None:
            return None
        return self._read(weight, self.spans())

    def spans(self, out_features: int | None = None) -> list[int]:
        """Gives the rows of W that are read now, as flat (start, length) pairs."""
        if len(self._extents) < 2 or self._scope is None:
            return [0, self._size(out_features, self.out_features, "out_features")]
        return self._spans_of(self._scope.sizes)

    def _groups(self, x: Tensor, rows: RowSizes) -> list[Group]:
        tokens = x[0].numel() // x.shape[-1]  # of one row of the batch
        groups = []
        for start, end, sizes in rows.runs(x.shape[0]):
            spans = tuple(self._spans_of(sizes))
            groups.append(Group(start * tokens, (end - start) * tokens, self._columns(sizes), spans))
        return groups

    def axes(self) -> Axes:
        ends = list(itertools.accumulate(self._parts))
        parts = zip(self._extents, self._parts, ends, strict=False)  # without an axis the one part is all of the rows
        return Axes(self._reads, tuple(OutputPart(size, end - length, end) for size, length, end in parts))

    def _computed_at(self, name: str, own: Tensor, sizes: LayerSizes | None) -> Tensor:
        spans, columns = [0, self.out_features], self.in_features
        if sizes is not None:
            spans, columns = self._spans_of(sizes), self._columns(sizes)
        whole = spans == [0, self.out_features] and columns == self.in_features
        if whole and (name == "bias" or not self.trained_stages):
            return own
        pairs = list(zip(spans[::2], spans[1::2], strict=True))
        if name == "bias":
            return torch.cat([own[start : start + length] for start, length in pairs])
        if self.trained_stages:
            matrix = self.merged_weight(None, columns, spans).to(own.dtype)
        else:
            parts = [self._matrix()[start : start + length, :columns] for start, length in pairs]
            matrix = torch.cat(parts) if len(parts) > 1 else parts[0]
        return matrix.t() if self.transposed else matrix

    def extract_at(self, sizes: LayerSizes) -> nn.Module:
        return self._extract(self._spans_of(sizes), self._columns(sizes))

    def extract(self, out_features: int | None = None, in_features: int | None = None) -> nn.Module:
        """Makes the plain layer of one size, of the class this one was made from, with the trained stages merged in.

        Args:
            out_features, in_features: how many rows and columns of W it has, the leading ones; by default what a call
                computes now: the active subnet's where the layer follows one, else all.

        Raises:
            MLFSError: a size that the layer does not have.
        """
        if in_features is None and self._scope is not None:
            in_features = self._columns(self._scope.sizes)
        elif in_features is None:
            in_features = self.in_features
        if not is_int(in_features) or not 1 <= in_features <= self.in_features:
            raise MLFSError(f"in_features={in_features!r}: expected 1 to {self.in_features}")
        if out_features is not None and len(self._extents) > 1:
            raise MLFSError(f"out_features={out_features}: the layer writes {len(self._extents)} parts; leave it out")
        return self._extract(self.spans(out_features), in_features)

    @torch.no_grad()
    def _extract(self, spans: Sequence[int], columns: int) -> nn.Module:
        weight = self.merged_weight(None, columns, spans).to(self.own_weight.dtype)
        bias: Tensor | None = self.own_bias
        if bias is not None:
            pairs = zip(spans[::2], spans[1::2], strict=True)
            bias = torch.cat([bias[start : start + length] for start, length in pairs])
        names = ("out_features", "in_features")
        rows_and_columns = weight.shape
        if self.transposed:  # a Conv1D, which keeps (in, out)
            weight, names = weight.t(), ("nf", "nx")
        module = self.plain(weight=weight.contiguous(), bias=bias)
        for name, size in zip(names, rows_and_columns, strict=True):
            setattr(module, name, size)
        return module

    def read_sizes(self, sizes: LayerSizes) -> tuple[int, int]:
        """Gives (n, m): how many columns and rows of W a subnet reads; 0 where it leaves the layer out."""
        rows = self.out_features
        if self._extents:
            rows = sum(extent(sizes) for extent in self._extents)
        return self._columns(sizes), rows

    def _columns(self, sizes: LayerSizes) -> int:
        return self._reads(sizes) if self._reads else self.in_features

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}, stages={self.stages}"
        )

    def _matrix(self) -> Tensor:
        return self.own_weight.t() if self.transposed else self.own_weight

    def _spans_of(self, sizes: LayerSizes) -> list[int]:
        """The rows that `sizes` read: of each fused part the leading ones."""
        if not self._extents:
            return [0, self.out_features]
        spans, start = [0, 0], 0
        for extent, part in zip(self._extents, self._parts, strict=True):
            length = extent(sizes)
            if spans[-2] + spans[-1] == start:  # follows on: one product instead of two
                spans[-1] += length
            else:
                spans += [start, length]
            start += part
        return spans


def _values(parameters: nn.ParameterList) -> list[Tensor]:
    """The parameters of a list; iterating over it takes longer than a small product."""
    return list(parameters._parameters.values())  # type: ignore[arg-type]


def _first_named(module: nn.Module, name: str) -> type[nn.Module] | None:
    """Finds the class of that name among those a module is of: transformers' own, without importing it."""
    return next((kind for kind in type(module).__mro__ if kind.__name__ == name), None)


def _is_floating(value: object) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()
