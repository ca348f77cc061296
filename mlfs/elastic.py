"""Elastic layers: drop-in replacements that read the leading slice of a frozen layer's weights.

Each shares the storage of the layer it was made from. How much it reads follows from its input (columns), and from an
argument or the active subnet (rows). They work in any PyTorch model; `SuperTransformer` places them in a Hugging Face
model and binds them to its subnets.
"""

import copy
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mlfs.errors import MLFSError
from mlfs.ops.backend import backend_of, is_direct
from mlfs.ops.feed_forward import feed_forward as feed_forward_operator
from mlfs.ops.feed_forward import may_feed_forward
from mlfs.ops.grouped_linear import Group, grouped_sliced_linear, grouped_sliced_linear_reference
from mlfs.ops.joint_linear import Projection, joint_linear, may_join
from mlfs.ops.norm import add_norm
from mlfs.ops.sliced_linear import Layer, direct_linears, finish, sliced_linear, sliced_linear_reference
from mlfs.sizes import Extent, RowSizes, Scope, Sizes


class Elastic(nn.Module):
    """What the elastic layers share: the parameters of the layer they came from, and the subnet they follow."""

    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.register_parameter("weight", module.weight)  # type: ignore[arg-type]
        self.register_parameter("bias", getattr(module, "bias", None))
        self.training = module.training
        self._template = (_without_parameters(module),)  # in a tuple: not a submodule
        self._scope: Scope | None = None
        self._extents: tuple[Extent, ...] = ()
        # Whether its base weights belong to the run (a task head, a norm that trained) and are saved with it.
        self.owned = False

    def bind(self, scope: Scope, *extents: Extent) -> None:
        """Lets the active subnet of `scope` give the sizes, along one axis for each fused part."""
        self._scope, self._extents = scope, extents

    def train_base(self, trains: bool) -> None:
        """Lets the layer's own weight and bias train, or freezes them."""
        for parameter in (self.weight, self.bias):
            if parameter is not None:
                parameter.requires_grad_(trains)

    def plain(self, **parameters: Tensor | None) -> nn.Module:
        """A module of the class this one was made from, holding `parameters`."""
        module = copy.copy(self._template[0])
        module._parameters = {name: None if p is None else nn.Parameter(p) for name, p in parameters.items()}
        module.training = self.training
        return module

    def extract(self, sizes: Sizes) -> nn.Module:
        """The plain, smaller module that computes the same under `sizes`."""
        raise NotImplementedError

    def _row_sizes(self) -> RowSizes | None:
        sizes = None if self._scope is None else self._scope.sizes
        return sizes if isinstance(sizes, RowSizes) else None

    def _size(self, asked: int | None, full: int, what: str) -> int:
        if asked is None:
            return full if self._scope is None or not self._extents else self._extents[0](self._scope.sizes)
        if not 1 <= asked <= full:
            raise MLFSError(f"{what}={asked}: expected 1 to {full}")
        return asked


class ElasticLinear(Elastic):
    """y = x · W[:m, :n]ᵀ + b[:m] + Σ_s c_s (x · A_s[:, :n]ᵀ) B_s[:m]ᵀ for a Linear's own W (out, in) and b.

    n is read off x. m is `out_features` of the call, else the active subnet's, else all. The low-rank stages
    (`lora_A[s]`: (rank, in), `lora_B[s]`: (out, rank)) start at zero effect: B_s = 0. Stage 0 trains until
    `train_stage` says otherwise. Scale c_s = alpha / rank, as in LoRA (arXiv 2106.09685).

    >>> layer = ElasticLinear.from_linear(nn.Linear(768, 3072), rank=8, stages=3)
    >>> layer(torch.ones(2, 5, 512), out_features=1536).shape
    torch.Size([2, 5, 1536])
    """

    def __init__(
        self, linear: nn.Module, rank: int = 8, stages: int = 3, alpha: float = 16.0, train_base: bool = False
    ) -> None:
        transposed = hasattr(linear, "nf")
        if not (transposed or isinstance(linear, nn.Linear)) or not _is_floating(linear.weight):
            raise MLFSError(f"{type(linear).__name__}: expected an nn.Linear or a Conv1D of floating-point numbers")
        super().__init__(linear)
        # transformers' Conv1D keeps W as (in, out); reading it through its strides makes the two alike.
        self.transposed = transposed
        self.out_features, self.in_features = self._matrix().shape
        if rank < 0 or stages < 0 or rank > min(self.in_features, self.out_features):
            raise MLFSError(
                f"rank={rank}, stages={stages} for a {self.out_features} x {self.in_features} layer: "
                f"expected 0 <= rank <= {min(self.in_features, self.out_features)} and stages >= 0; choose a lower rank"
            )
        self.rank, self.stages, self.folded_stages = rank, stages if rank else 0, 0
        # Adapters stay in fp32 over a half-precision base: their updates are small.
        kind = torch.promote_types(self.weight.dtype, torch.float32)
        like: dict[str, Any] = {"dtype": kind, "device": self.weight.device}
        self.lora_A = nn.ParameterList(
            nn.init.kaiming_uniform_(torch.empty(rank, self.in_features, **like), a=math.sqrt(5))
            for _ in range(self.stages)
        )
        self.lora_B = nn.ParameterList(torch.zeros(self.out_features, rank, **like) for _ in range(self.stages))
        self.scales = [alpha / max(rank, 1)] * self.stages
        self.live = min(self.stages, 1)  # later stages have B = 0 and cost nothing
        self._reads: Extent | None = None
        self.register_buffer("_folded", None, persistent=False)
        self.train_base(train_base)
        self.train_stage(0 if self.stages else None)
        self._parts: tuple[int, ...] = (self.out_features,)

    @classmethod
    def from_linear(
        cls, linear: nn.Module, rank: int = 8, stages: int = 3, alpha: float = 16.0, train_base: bool = False
    ) -> "ElasticLinear":
        """An elastic layer on the storage of `linear` (an nn.Linear, or transformers' Conv1D).

        Args:
            rank, stages, alpha: of the low-rank stages; rank 0 for none.
            train_base: whether W and b themselves train (for a network trained from scratch); else they are frozen.
        """
        return cls(linear, rank, stages, alpha, train_base)

    def bind(self, scope: Scope, *extents: Extent, reads: Extent | None = None) -> None:
        super().bind(scope, *extents)
        self._reads = reads
        self._parts = tuple(extent(scope.default) for extent in extents) or (self.out_features,)
        full = reads(scope.default) if reads else self.in_features
        if (sum(self._parts), full) != (self.out_features, self.in_features):
            raise MLFSError(
                f"a {self.out_features} x {self.in_features} projection, where the model's configuration makes it "
                f"{sum(self._parts)} x {full}"
            )

    def forward(
        self,
        x: Tensor,
        out_features: int | None = None,
        activation: str = "none",
        operand: Tensor | None = None,
        residual: Tensor | None = None,
    ) -> Tensor:
        """x: (..., n) -> act(y) + residual: (..., m); see the class, and `mlfs.ops.sliced_linear` for the options."""
        if x.shape[-1] > self.in_features:
            raise MLFSError(f"input of width {x.shape[-1]}, expected at most in_features={self.in_features}")
        rest = activation, operand, residual
        if (rows := self._row_sizes()) is not None and out_features is None:
            grouped = grouped_sliced_linear_reference if self.weight.requires_grad else grouped_sliced_linear
            flat = x.reshape(-1, x.shape[-1])
            y = grouped(flat, *self._reads_at([])[:-1], self._groups(x, rows)).view(*x.shape[:-1], -1)
            return finish(y, *rest)
        layer = self._reads_at(self.spans(out_features))
        if is_direct(x, layer[0], operand, residual):
            return direct_linears(x, [layer], *rest)[0]
        op = sliced_linear_reference if self.weight.requires_grad else sliced_linear
        return op(x, *layer, *rest)

    def reads_now(self) -> Layer:
        """(weight, bias, lora_a, lora_b, scales, spans) under the active subnet, in the operators' order."""
        return self._reads_at(self.spans())

    def _reads_at(self, spans: list[int]) -> Layer:
        weight = self._matrix() if self._folded is None else self._folded
        live = slice(self.folded_stages, self.live)
        lora = _values(self.lora_A)[live], _values(self.lora_B)[live], self.scales[live]
        return weight, self.bias, *lora, spans

    def projection(self) -> Projection | None:
        """Itself as `joint_linear` takes it; None where it has to be called: its base trains, rows have sizes of their
        own, it is several projections already, or someone watches its calls."""
        hooks = self._forward_hooks, self._forward_pre_hooks, self._backward_hooks, self._backward_pre_hooks
        if self.weight.requires_grad or any(hooks) or len(self._extents) > 1 or self._row_sizes() is not None:
            return None
        return Projection(*self._reads_at([])[:-1], self._size(None, self.out_features, "out_features"))

    def spans(self, out_features: int | None = None) -> list[int]:
        """The rows of W that are read now, as flat (start, length) pairs."""
        if len(self._extents) < 2 or self._scope is None:
            return [0, self._size(out_features, self.out_features, "out_features")]
        return self._fused_spans(self._scope.sizes)

    def _groups(self, x: Tensor, rows: RowSizes) -> list[Group]:
        tokens = x[0].numel() // x.shape[-1]
        groups = []
        for start, end, sizes in rows.runs(x.shape[0]):
            spans = self._fused_spans(sizes) if self._extents else [0, self.out_features]
            n = self._reads(sizes) if self._reads else self.in_features
            groups.append(Group(start * tokens, (end - start) * tokens, n, tuple(spans)))
        return groups

    def train_stage(self, stage: int | None) -> None:
        """Lets only the adapters of `stage` train; None: of no stage."""
        if stage is not None and not 0 <= stage < self.stages:
            raise MLFSError(f"stage={stage}: this layer has stages 0 to {self.stages - 1}")
        if stage is not None and stage < self.folded_stages:
            raise MLFSError(f"stage {stage} is folded: fold at most {stage} stages to train it")
        for s in range(self.stages):
            self.lora_A[s].requires_grad_(s == stage)
            self.lora_B[s].requires_grad_(s == stage)
        if stage is not None:
            self.live = max(self.live, stage + 1)

    @torch.no_grad()
    def fold(self, stages: int) -> None:
        """Reads the first `stages` stages from one merged matrix, in fp32 or wider, beside the untouched W; 0: W."""
        if not 0 <= stages <= self.stages:
            raise MLFSError(f"cannot fold {stages} of {self.stages} stages")
        if stages and self.weight.requires_grad:
            raise MLFSError("the base trains: it cannot be read from a merged copy; freeze it, or do not fold")
        self.folded_stages, self._folded = 0, None
        if stages:
            self._folded = self.merged(stages)
            self.folded_stages = stages

    def merged(self, stages: int | None = None, columns: int | None = None, spans: Sequence[int] = ()) -> Tensor:
        """(W + Σ_{s < stages} c_s B_s A_s)[rows, :columns], in the adapters' type; all by default."""
        n = self.in_features if columns is None else columns
        spans = spans or [0, self.out_features]
        rows = torch.cat([torch.arange(a, a + k) for a, k in zip(spans[::2], spans[1::2], strict=True)])
        rows = rows.to(self.weight.device)
        kind = torch.promote_types(self.weight.dtype, torch.float32)
        w = self._matrix()[:, :n].index_select(0, rows).to(kind)
        for a, b, c in list(zip(self.lora_A, self.lora_B, self.scales, strict=True))[: self.live][:stages]:
            w = torch.addmm(w, b.index_select(0, rows), a[:, :n], alpha=c)
        return w

    @torch.no_grad()
    def extract(self, sizes: Sizes) -> nn.Module:
        n, _ = self.read_sizes(sizes)
        spans = self._fused_spans(sizes) if self._extents else [0, self.out_features]
        weight = self.merged(None, n, spans).to(self.weight.dtype)
        bias = self.bias
        if bias is not None:
            pairs = zip(spans[::2], spans[1::2], strict=True)
            bias = torch.cat([bias[a : a + k] for a, k in pairs])  # type: ignore[assignment]
        module = self.plain(weight=weight.t().contiguous() if self.transposed else weight.contiguous(), bias=bias)
        names = ("nf", "nx") if self.transposed else ("out_features", "in_features")
        for name, size in zip(names, weight.shape, strict=True):
            setattr(module, name, size)
        return module

    def read_sizes(self, sizes: Sizes) -> tuple[int, int]:
        """(n, m): how many columns and rows of W a subnet reads; 0 where it leaves the layer out."""
        m = sum(extent(sizes) for extent in self._extents) if self._extents else self.out_features
        return self._reads(sizes) if self._reads else self.in_features, m

    def adapter_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """(name, tensor) of every stage."""
        yield from self.lora_A.named_parameters("lora_A")
        yield from self.lora_B.named_parameters("lora_B")

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}, stages={self.stages}"
        )

    def _matrix(self) -> Tensor:
        return self.weight.t() if self.transposed else self.weight

    def _fused_spans(self, sizes: Sizes) -> list[int]:
        spans, start = [0, 0], 0
        for extent, part in zip(self._extents, self._parts, strict=True):
            length = extent(sizes)
            if spans[-2] + spans[-1] == start:  # follows on: one product instead of two
                spans[-1] += length
            else:
                spans += [start, length]
            start += part
        return spans


class ElasticEmbedding(Elastic):
    """Rows of an embedding table, cut to the leading `features` columns (else the active subnet's, else all).

    >>> ElasticEmbedding.from_embedding(nn.Embedding(100, 64))(torch.tensor([[1, 2]]), features=48).shape
    torch.Size([1, 2, 48])
    """

    def __init__(self, embedding: nn.Embedding, train_base: bool = False) -> None:
        super().__init__(embedding)
        self.num_embeddings, self.embedding_dim = embedding.num_embeddings, embedding.embedding_dim
        self.padding_idx = embedding.padding_idx
        if embedding.max_norm is not None or embedding.sparse or embedding.scale_grad_by_freq:
            raise MLFSError("an embedding with max_norm, sparse or scale_grad_by_freq cannot be made elastic")
        self.train_base(train_base)

    @classmethod
    def from_embedding(cls, embedding: nn.Embedding, train_base: bool = False) -> "ElasticEmbedding":
        """An elastic layer on the storage of `embedding`; frozen unless `train_base`."""
        return cls(embedding, train_base)

    def forward(self, ids: Tensor, features: int | None = None) -> Tensor:
        """ids: (...) integers -> (..., features)."""
        width = self._size(features, self.embedding_dim, "features")
        return nn.functional.embedding(ids, self.weight[:, :width], self.padding_idx)

    def extract(self, sizes: Sizes) -> nn.Module:
        width = self._extents[0](sizes)
        module = self.plain(weight=self.weight.detach()[:, :width].clone())
        module.embedding_dim = width  # type: ignore[assignment]
        return module


class ElasticNorm(Elastic):
    """What the norms share."""

    eps: float
    rms: bool
    statistics: torch.dtype | None = None  # the type they are taken in, where it is not x's or wider

    def forward(self, x: Tensor) -> Tensor:
        """(..., n) -> (..., n)."""
        return self.after(x)[0]

    def after(self, x: Tensor, residual: Tensor | None = None, p: float = 0.0) -> tuple[Tensor, Tensor]:
        """(norm(s), s) of s = residual + dropout(x), each (..., n).

        Args:
            residual: (..., n), or None for nothing.
            p: probability of dropout.
        """
        if self.weight is not None and x.shape[-1] > self.weight.shape[0]:
            raise MLFSError(f"input of width {x.shape[-1]}, expected at most {self.weight.shape[0]}")
        if (rows := self._row_sizes()) is None:
            return self._norm(x, residual, p)
        x = nn.functional.dropout(x, p)
        s = x if residual is None else residual + x
        parts = []  # of each row the leading numbers that it has, zeros after them
        for start, end, sizes in rows.runs(s.shape[0]):
            width = self._extents[0](sizes)
            y, _ = self._norm(s[start:end, ..., :width])
            parts.append(nn.functional.pad(y, (0, s.shape[-1] - width)))
        return parts[0] if len(parts) == 1 else torch.cat(parts), s

    def reads_now(self) -> tuple[Tensor | None, Tensor | None, float]:
        """(weight, bias, eps), in the operators' order."""
        return self.weight, self.bias, self.eps

    def _norm(self, x: Tensor, residual: Tensor | None = None, p: float = 0.0) -> tuple[Tensor, Tensor]:
        return add_norm(x, residual, self.weight, self.bias, self.eps, self.rms, p, statistics=self.statistics)


class ElasticLayerNorm(ElasticNorm):
    """LayerNorm over however many numbers the input has, with the leading ones of weight and bias.

    >>> ElasticLayerNorm.from_layer_norm(nn.LayerNorm(64))(torch.randn(2, 48)).shape
    torch.Size([2, 48])
    """

    rms = False

    def __init__(self, norm: nn.LayerNorm, train_base: bool = False) -> None:
        super().__init__(norm)
        if len(norm.normalized_shape) != 1:
            raise MLFSError(f"normalized_shape={norm.normalized_shape}: only the last axis can be elastic")
        self.eps, self.normalized_shape = norm.eps, norm.normalized_shape
        self.train_base(train_base)

    @classmethod
    def from_layer_norm(cls, norm: nn.LayerNorm, train_base: bool = False) -> "ElasticLayerNorm":
        """An elastic layer on the storage of `norm`; frozen unless `train_base`."""
        return cls(norm, train_base)

    def extract(self, sizes: Sizes) -> nn.Module:
        width = self._extents[0](sizes)
        module = self.plain(
            weight=None if self.weight is None else self.weight.detach()[:width].clone(),
            bias=None if self.bias is None else self.bias.detach()[:width].clone(),
        )
        module.normalized_shape = (width,)  # type: ignore[assignment]
        return module


class ElasticRMSNorm(ElasticNorm):
    """RMSNorm over however many numbers the input has, with the leading ones of the weight.

    Made from torch's nn.RMSNorm or a transformers one (any module with `weight` and `variance_epsilon` or `eps`).

    >>> ElasticRMSNorm.from_rms_norm(nn.RMSNorm(64, eps=1e-6))(torch.randn(2, 48)).shape
    torch.Size([2, 48])
    """

    rms = True

    def __init__(self, norm: nn.Module, train_base: bool = False) -> None:
        super().__init__(norm)
        if self.weight is None or self.weight.dim() != 1:
            raise MLFSError("an RMSNorm needs a weight over the last axis to be made elastic")
        eps = getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
        self.eps: float = torch.finfo(self.weight.dtype).eps if eps is None else eps
        self.statistics = None if isinstance(norm, nn.RMSNorm) else torch.float32  # transformers: whatever x is
        self.train_base(train_base)

    @classmethod
    def from_rms_norm(cls, norm: nn.Module, train_base: bool = False) -> "ElasticRMSNorm":
        """An elastic layer on the storage of `norm`; frozen unless `train_base`."""
        return cls(norm, train_base)

    def extract(self, sizes: Sizes) -> nn.Module:
        width = self._extents[0](sizes)
        module = self.plain(weight=self.weight.detach()[:width].clone())
        if isinstance(module, nn.RMSNorm):
            module.normalized_shape = (width,)
        return module


def project(x: Tensor, *layers: ElasticLinear, gated: bool = False, carries: bool = False) -> list[Tensor]:
    """What each layer makes of the same x; gated: of two layers, SiLU(the first's) · the second's, alone; and x, if it
    `carries`, for what else reads it. On kernels in one call."""
    more = [x] if carries else []
    if backend_of(x) != "reference" and (parts := _projections(x, layers)):
        direct = is_direct(x, *(part.weight for part in parts))
        if direct and not gated:
            return direct_linears(x, [(*part[:5], [0, part.rows]) for part in parts]) + more
        if not direct and may_join(parts):
            return joint_linear(x, parts, gated, carries)
    if not gated:
        return [layer(x) for layer in layers] + more
    gate, up = layers
    return [gate(x, activation="silu_mul", operand=up(x)), *more]


def feed_forward(
    x: Tensor,
    ups: Sequence[ElasticLinear],
    down: ElasticLinear,
    activation: str,
    residual: Tensor | None = None,
    carries: bool = False,
) -> list[Tensor]:
    """[down(act(up(x))) + residual], for two `ups` (gate and up) [down(SiLU(gate(x)) · up(x)) + residual]; and x, if it
    `carries`, for what else reads it. In training on kernels in one call."""
    if torch.is_grad_enabled() and backend_of(x) == "triton":
        parts = _projections(x, [*ups, down])
        if parts and may_feed_forward(parts, activation):
            return feed_forward_operator(x, parts, activation, residual, carries)
    (y,) = project(x, *ups, gated=True) if len(ups) > 1 else [ups[0](x, activation=activation)]
    return [down(y, residual=residual), *([x] if carries else [])]


def _projections(x: Tensor, layers: Sequence[ElasticLinear]) -> list[Projection]:
    """All layers as operators of several take them; none where one has to be called."""
    found = [layer.projection() for layer in layers] if x.shape[-1] <= layers[0].in_features else []
    parts = [part for part in found if part is not None]
    return parts if len(parts) == len(layers) else []


def train_stage(module: nn.Module, stage: int | None) -> None:
    """Lets the adapters of one stage train in every elastic layer of `module`; None: of no stage."""
    for layer in module.modules():
        if isinstance(layer, ElasticLinear) and layer.stages:
            layer.train_stage(stage)


def _without_parameters(module: nn.Module) -> nn.Module:
    template = copy.copy(module)
    template._parameters = {}
    return template


def _values(parameters: nn.ParameterList) -> list[Tensor]:
    """Its parameters; iterating over it takes longer than a small product."""
    return list(parameters._parameters.values())  # type: ignore[arg-type]


def _is_floating(value: object) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()
