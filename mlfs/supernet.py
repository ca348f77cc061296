"""`SuperTransformer`: a Hugging Face model whose sub-networks share its weights."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from mlfs import extract as extraction
from mlfs import ordering
from mlfs.convert import dimensions, make_elastic
from mlfs.elastic import Elastic, ElasticLayerNorm, ElasticLinear, ElasticRMSNorm, train_stage
from mlfs.errors import MLFSError
from mlfs.families import family_of
from mlfs.sizes import RowSizes, Scope, Sizes
from mlfs.subnet import SearchSpace, Subnet


class SuperTransformer(nn.Module):
    """Makes `model` elastic in place: no weight is copied, every base parameter keeps its storage and is frozen.

    Args:
        model: a transformers model of a family in the table.
        space: the sizes on offer; by default thirds and halves of the model's own (`Dimensions.default_space`).
        rank, stages, alpha: of the low-rank stages; the scale of an update is alpha / rank.
        base_name: what to record as the base, a hub name or a path; by default the model's own `name_or_path`.

    Raises:
        MLFSError: the family is not in the table, or the space does not fit the model.

    Outside `activate` the whole model (maxnet) runs. Anything the Hugging Face model does, this does too: attributes
    that are not found here are the model's. `torch.compile` traces the subnet active at the first call, and compiles
    anew for another.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        space: SearchSpace | None = None,
        rank: int = 8,
        stages: int = 3,
        alpha: float = 16.0,
        base_name: str | None = None,
    ) -> None:
        super().__init__()
        self.training = model.training
        self.family = family_of(model.config)
        self.dimensions = dimensions(model.config, self.family)
        self.space = self.dimensions.default_space() if space is None else space
        self.dimensions.check(self.space)
        self.rank, self.stages, self.alpha = rank, stages, alpha
        self.base_name = model.name_or_path if base_name is None else base_name
        self.permutation: ordering.Permutation = {}
        self.stage: int | None = 0 if stages and rank else None
        self._scope = Scope(self.dimensions.sizes(self.space.max))
        self._sizes: dict[Subnet, Sizes] = {}
        self._fingerprint: dict[str, list[str]] | None = None
        layers = make_elastic(model, self.family, self.dimensions, self._scope, rank, stages, alpha)
        self.model = model
        self.layers_name = next(name for name, module in model.named_modules() if module is layers)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The Hugging Face model's forward pass, under the active subnet."""
        return self.model(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "model":
                raise
            return getattr(self.model, name)

    @property
    def layers(self) -> nn.ModuleList:
        """The list of all transformer layers."""
        return self.model.get_submodule(self.layers_name)  # type: ignore[return-value]

    @contextmanager
    def activate(self, subnet: Subnet) -> Iterator["SuperTransformer"]:
        """Runs `subnet` inside the block, in this thread or task only; blocks nest. Nothing is copied or allocated.

        Raises MLFSError if `subnet` is not in the space.
        """
        with self._scope.activate(self.sizes(subnet)):
            yield self

    @contextmanager
    def activate_rows(self, subnets: Sequence[Subnet]) -> Iterator["SuperTransformer"]:
        """Runs each row of a batch at a size of its own inside the block: `subnets[i]` for row i.

        Works for encoders and for `generate`; each row comes out as if it ran alone. Logits and the like are those of
        each row's subnet; hidden states keep maxnet's width, of which a row's leading `hidden` numbers count.
        """
        full = self._scope.default
        rows = tuple(self.sizes(subnet) for subnet in subnets)
        with self._scope.activate(RowSizes(full.subnet, full.of_layer, rows)):
            yield self

    @property
    def active(self) -> Subnet:
        """The subnet that runs now; maxnet where rows have their own."""
        return self._scope.sizes.subnet

    def sizes(self, subnet: Subnet) -> Sizes:
        """What `subnet` means for each layer; checked once, then remembered."""
        if not isinstance(subnet, Subnet):
            raise MLFSError(f"expected a Subnet, got {type(subnet).__name__}: {subnet!r}")
        sizes = self._sizes.get(subnet)
        if sizes is None:
            self.space.check(subnet)
            if len(self._sizes) >= 10_000:  # a long run samples without end
                self._sizes.clear()
            sizes = self._sizes[subnet] = self.dimensions.sizes(subnet)
        return sizes

    def extract(self, subnet: Subnet) -> PreTrainedModel:
        """A plain transformers model that computes what `subnet` does: smaller modules, stages merged, own storage.

        Where the family's configuration cannot state the sizes, the model works but its `save_pretrained` raises
        MLFSError and names the nearest subnet that can be saved.
        """
        return extraction.extract(self, subnet)

    def is_expressible(self, subnet: Subnet) -> bool:
        """Whether `extract(subnet)` can be saved as a checkpoint."""
        return extraction.is_expressible(subnet, self.family, self.dimensions)

    def train_stage(self, stage: int | None, head: bool = True, norms: bool = False) -> None:
        """Lets only the adapters of `stage` train (None: of no stage), and the task head and norms as asked."""
        if stage is not None and not 0 <= stage < self.stages:
            raise MLFSError(f"stage={stage}: this super-transformer has stages 0 to {self.stages - 1}")
        train_stage(self.model, stage)
        self.stage = stage
        if norms:
            self.fingerprint()  # of the base as it was loaded
        for module in self.elastic():
            if isinstance(module, (ElasticLayerNorm, ElasticRMSNorm)):
                module.train_base(norms)
                module.owned |= norms
            elif module.owned:
                module.train_base(head)

    def fold(self, stages: int) -> None:
        """Merges the first `stages` stages into an fp32 copy of the projections, which is read instead; 0: undoes it.

        The base itself is not touched, and is what is saved.
        """
        for module in self.elastic():
            if isinstance(module, ElasticLinear) and module.stages:
                module.fold(stages)

    @property
    def folded_stages(self) -> int:
        """How many stages are merged into the copy that is read now."""
        return max((m.folded_stages for m in self.elastic() if isinstance(m, ElasticLinear)), default=0)

    def order(self, method: ordering.Method = "magnitude", batches: Iterable[Mapping[str, Any]] | None = None) -> None:
        """Permutes heads, feed-forward units and the residual stream, most important first; see `mlfs.ordering`.

        The full model's function stays; what each smaller subnet keeps changes. Done in place, and recorded.
        """
        self.apply_permutation(ordering.permutation_of(ordering.importance(self, method, batches)))

    def apply_permutation(self, permutation: ordering.Permutation) -> None:
        """Reorders the units in place: `permutation` holds the old index of each unit at its new place."""
        ordering.check_permutation(permutation, self.dimensions)
        self.fingerprint()
        folded = self.folded_stages
        self.fold(0)
        ordering.permute(self, permutation)
        self.fold(folded)
        self.permutation = ordering.compose(self.permutation, permutation)

    def elastic(self) -> Iterator[Elastic]:
        """Every elastic module."""
        return (module for module in self.model.modules() if isinstance(module, Elastic))

    def own_parameters(self) -> dict[str, nn.Parameter]:
        """What a run owns, by the names of the model: the stages, and task heads or norms that trained."""
        own: dict[str, nn.Parameter] = {}
        for name, module in self.model.named_modules():
            if not isinstance(module, Elastic):
                continue
            if isinstance(module, ElasticLinear):
                own |= {f"{name}.{key}": p for key, p in module.adapter_parameters()}
            if module.owned:
                own |= {f"{name}.{key}": p for key in ("weight", "bias") if (p := getattr(module, key)) is not None}
        return own

    def base_parameters(self) -> dict[str, nn.Parameter]:
        """The parameters the base came with, but for task heads; each tied one once."""
        adapters = {f"{n}.{k}" for n, m in self.model.named_modules() if isinstance(m, ElasticLinear)
                    for k, _ in m.adapter_parameters()}  # fmt: skip
        heads = {f"{n}.{k}" for n, m in self.model.named_modules() if isinstance(m, ElasticLinear) and m.owned
                 for k in ("weight", "bias")}  # fmt: skip
        return {n: p for n, p in self.model.named_parameters() if n not in adapters and n not in heads}

    def fingerprint(self) -> dict[str, list[str]]:
        """Hashes of each base parameter as loaded, in fp32, bf16 and fp16; computed once, before it is reordered."""
        from mlfs.checkpoint import fingerprint

        if self._fingerprint is None:
            self._fingerprint = fingerprint(self.base_parameters())
        return self._fingerprint

    def count_parameters(self, subnet: Subnet) -> int:
        """Parameters of `extract(subnet)`, each tied one once."""
        sizes, total, seen = self.sizes(subnet), 0, set()
        for parameter, shape in self._shapes(sizes):
            if id(parameter) not in seen:
                seen.add(id(parameter))
                total += shape
        return total

    def count_trainable(self, subnet: Subnet) -> int:
        """Parameters that now train and that `subnet` uses: the n_j of gradient scaling."""
        sizes = self.sizes(subnet)
        total = sum(count for parameter, count in self._shapes(sizes) if parameter.requires_grad)
        for module in self.elastic():
            if isinstance(module, ElasticLinear):
                n, m = module.read_sizes(sizes)
                if n and m:
                    total += sum(a.shape[0] * (n + m) for a in module.lora_A if a.requires_grad)
        return total

    def save_pretrained(self, path: str | Path) -> None:
        """Writes the stages, the space, the permutation and the reference to the base; not the base itself.

        Files: `mlfs.json` and the safetensors file it names. Written under new names first, so that an interrupted
        save leaves what was there.
        """
        from mlfs.checkpoint import save

        save(self, Path(path))

    @classmethod
    def from_pretrained(
        cls, path: str | Path, model: PreTrainedModel | None = None, **model_kwargs: Any
    ) -> "SuperTransformer":
        """Restores what `save_pretrained` wrote, exactly.

        Args:
            path: the folder.
            model: the base, if it is at hand; else it is loaded from where it came, with `model_kwargs`.

        Raises:
            MLFSError: the folder is missing, half-written or changed, or the base is not the one it was trained on.
        """
        from mlfs.checkpoint import load

        return load(Path(path), model, **model_kwargs)

    def _shapes(self, sizes: Sizes) -> Iterator[tuple[Tensor, int]]:
        """(base parameter, how many of its numbers `sizes` uses)."""
        dropped = tuple(f"{self.layers_name}.{i}." for i in range(self.dimensions.layers) if not sizes.keeps(i))
        for name, module in self.model.named_modules():
            if name.startswith(dropped):
                continue
            if isinstance(module, ElasticLinear):
                n, m = module.read_sizes(sizes)
                yield module.weight, n * m
                if module.bias is not None:
                    yield module.bias, m
            elif isinstance(module, Elastic):
                width = module._extents[0](sizes)
                yield module.weight, module.weight.numel() // module.weight.shape[-1] * width
                if module.bias is not None:
                    yield module.bias, width
            elif not isinstance(module, nn.ParameterList):
                yield from ((p, p.numel()) for p in module._parameters.values() if p is not None)
