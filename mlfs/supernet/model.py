"""`SuperTransformer`, a Hugging Face model whose subnets share its weights."""

import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from mlfs.elastic.base import Elastic
from mlfs.elastic.linear import ElasticLinear, train_stage
from mlfs.elastic.norm import ElasticNorm
from mlfs.elastic.scope import Scope
from mlfs.errors import MLFSError
from mlfs.models.configuration import dimensions, is_exportable, nearest_exportable, why_not_exportable
from mlfs.models.convert import AdapterOptions, make_elastic
from mlfs.models.families.table import family_of
from mlfs.models.pretrained import load_base
from mlfs.space.dimensions import LayerSizes, RowSizes
from mlfs.space.search_space import SearchSpace
from mlfs.space.subnet import Subnet
from mlfs.supernet.checkpoint import SavedState, read_state, write_state
from mlfs.supernet.count import count_parameters, count_trainable
from mlfs.supernet.extract import extract
from mlfs.supernet.fingerprint import Fingerprint, check_base, fingerprint
from mlfs.supernet.importance import Method, Scores, importance
from mlfs.supernet.permutation import (
    Permutation,
    check_permutation,
    compose,
    difference,
    permutation_of,
    permute,
)


class SuperTransformer(nn.Module):
    """Makes `model` elastic in place: no weight is copied, every base parameter keeps its storage and is frozen.

    Args:
        model: a transformers model of a family in the table.
        space: the sizes on offer; by default thirds and halves of the model's own (`Dimensions.default_space`).
        rank: of the update of each layer in each stage; 0 for none.
        stages: how many updates each layer has, which train one after the other.
        alpha: an update counts alpha / rank times.
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
        self.permutation: Permutation = {}
        self.stage: int | None = 0 if stages and rank else None
        self._scope = Scope(self.dimensions.layer_sizes(self.space.max))
        self._layer_sizes: dict[Subnet, LayerSizes] = {}
        self._fingerprint: Fingerprint | None = None
        adapters = AdapterOptions(rank, stages, alpha)
        layers = make_elastic(model, self.family, self.dimensions, self._scope, adapters)
        self.model = model
        self.layers_name = next(name for name, module in model.named_modules() if module is layers)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the Hugging Face model's forward pass under the active subnet; takes and returns what the model does."""
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
        """The model's list of all its layers."""
        return self.model.get_submodule(self.layers_name)  # type: ignore[return-value]

    @contextmanager
    def activate(self, subnet: Subnet) -> Iterator["SuperTransformer"]:
        """Runs `subnet` inside the block, in this thread or task only; blocks nest. Nothing is copied or allocated.

        Raises:
            MLFSError: `subnet` is not in the space.
        """
        with self._scope.activate(self.layer_sizes(subnet)):
            yield self

    @contextmanager
    def activate_rows(self, subnets: Sequence[Subnet]) -> Iterator["SuperTransformer"]:
        """Runs each row of a batch at a size of its own inside the block: `subnets[i]` for row i.

        Works for encoders and for `generate`; each row comes out as if it ran alone. Logits and the like are those of
        each row's subnet; hidden states keep maxnet's width, of which a row's leading `hidden` numbers count.

        Raises:
            MLFSError: a subnet is not in the space; or, when the model runs, the batch has another number of rows.
        """
        full = self._scope.default
        rows = tuple(self.layer_sizes(subnet) for subnet in subnets)
        with self._scope.activate(RowSizes(full.subnet, full.of_layer, full.head_dim, rows)):
            yield self

    @property
    def active(self) -> Subnet:
        """The subnet that runs now; maxnet inside of `activate_rows`."""
        return self._scope.sizes.subnet

    def layer_sizes(self, subnet: Subnet) -> LayerSizes:
        """Spells `subnet` out for each layer; it is checked once, then remembered.

        Raises:
            MLFSError: `subnet` is not in the space, or no Subnet.
        """
        if not isinstance(subnet, Subnet):
            raise MLFSError(f"expected a Subnet, got {type(subnet).__name__}: {subnet!r}")
        sizes = self._layer_sizes.get(subnet)
        if sizes is None:
            self.space.check(subnet)
            if len(self._layer_sizes) >= 10_000:  # a long run samples without end
                self._layer_sizes.clear()
            sizes = self.dimensions.layer_sizes(subnet)
            self._layer_sizes[subnet] = sizes
        return sizes

    # ---- small models out of the large one ------------------------------------------------------------------------

    def extract(self, subnet: Subnet) -> PreTrainedModel:
        """Makes a plain transformers model that computes what `subnet` does, in smaller modules with merged stages.

        Where the family's configuration cannot state the sizes, the model works but its `save_pretrained` raises
        MLFSError and names the nearest subnet that can be saved.
        """
        small = extract(self.model, self.layers_name, self.layer_sizes(subnet), self.family, self.dimensions)
        if not self.is_exportable(subnet):
            # Saved anyway, it would load as a model with other sizes and random weights.
            refuse = functools.partial(_refuse, message=self.why_not_exportable(subnet))
            vars(small).update(save_pretrained=refuse, push_to_hub=refuse)
        return small

    def is_exportable(self, subnet: Subnet) -> bool:
        """Tells whether `extract(subnet)` can be saved as a checkpoint."""
        return is_exportable(subnet, self.family, self.dimensions)

    def why_not_exportable(self, subnet: Subnet) -> str:
        """Says why `subnet` cannot be saved as a checkpoint, and which subnet of the space nearest to it can."""
        nearest = nearest_exportable(subnet, self.space, self.family, self.dimensions)
        return why_not_exportable(subnet, self.family, nearest)

    def count_parameters(self, subnet: Subnet) -> int:
        """Counts the parameters of `extract(subnet)`, each tied one once."""
        return count_parameters(self.model, self.layers_name, self.layer_sizes(subnet))

    def count_trainable(self, subnet: Subnet) -> int:
        """Counts the parameters that now train and that `subnet` uses: the n_j of gradient scaling."""
        return count_trainable(self.model, self.layers_name, self.layer_sizes(subnet))

    # ---- stages -----------------------------------------------------------------------------------------------------

    def train_stage(self, stage: int | None, head: bool = True, norms: bool = False) -> None:
        """Lets only the adapters of `stage` train (None: of no stage), and the task head and norms as asked.

        Raises:
            MLFSError: there is no such stage.
        """
        if stage is not None and not 0 <= stage < self.stages:
            raise MLFSError(f"stage={stage}: this super-transformer has stages 0 to {self.stages - 1}")
        train_stage(self.model, stage)
        self.stage = stage
        if norms:
            self.fingerprint()  # of the base as it was loaded
        for module in self.elastic():
            if isinstance(module, ElasticNorm):
                module.train_base(norms)
                module.owned |= norms
            elif module.owned:
                module.train_base(head)

    def merge_stages(self, stages: int) -> None:
        """Merges the first `stages` stages into an fp32 copy of the projections, which is read instead; 0: undoes it.

        The base itself is not touched, and is what is saved.
        """
        for module in self.elastic():
            if isinstance(module, ElasticLinear) and module.stages:
                module.merge_stages(stages)

    @property
    def merged_stages(self) -> int:
        """How many stages are merged into the copy that is read now."""
        return max((m.merged_stages for m in self.elastic() if isinstance(m, ElasticLinear)), default=0)

    # ---- order of the units -----------------------------------------------------------------------------------------

    def order(self, method: Method = "magnitude", batches: Iterable[Mapping[str, Any]] | None = None) -> None:
        """Permutes heads, feed-forward units and the residual stream, most important first.

        The full model's function stays; what each smaller subnet keeps changes. Done in place, and recorded.

        Arguments and errors: as `mlfs.supernet.importance.importance`.
        """
        self.apply_permutation(permutation_of(self.importance(method, batches)))

    def importance(self, method: Method, batches: Iterable[Mapping[str, Any]] | None = None) -> Scores:
        """Scores every unit of the whole model, whatever is active; see `mlfs.supernet.importance`."""
        with self.activate(self.space.max):
            return importance(self.model, self.dimensions, method, batches)

    def apply_permutation(self, permutation: Permutation) -> None:
        """Reorders the units in place, and records the order.

        Args:
            permutation: for each axis that is reordered, the old index of each unit at its new place.

        Raises:
            MLFSError: an entry is no permutation of an axis of this model; nothing has moved then.
        """
        check_permutation(permutation, self.dimensions)
        self.fingerprint()  # of the base as it was loaded
        merged = self.merged_stages
        self.merge_stages(0)
        permute(self.model, permutation, self.dimensions)
        self.merge_stages(merged)
        self.permutation = compose(self.permutation, permutation)

    # ---- what is whose ----------------------------------------------------------------------------------------------

    def elastic(self) -> Iterator[Elastic]:
        """Yields every elastic module."""
        return (module for module in self.model.modules() if isinstance(module, Elastic))

    def own_parameters(self) -> dict[str, nn.Parameter]:
        """Collects what belongs to a run, by the model's names: the stages, and task heads or norms that trained."""
        own: dict[str, nn.Parameter] = {}
        for name, module in self.model.named_modules():
            if not isinstance(module, Elastic):
                continue
            if isinstance(module, ElasticLinear):
                own |= {f"{name}.{key}": parameter for key, parameter in module.adapter_parameters()}
            if module.owned:
                for key in ("weight", "bias"):
                    if (parameter := getattr(module, key)) is not None:
                        own[f"{name}.{key}"] = parameter
        return own

    def base_parameters(self) -> dict[str, nn.Parameter]:
        """Collects the parameters that the base came with, but for task heads; each tied one once."""
        added = set()
        for name, module in self.model.named_modules():
            if isinstance(module, ElasticLinear):
                added |= {f"{name}.{key}" for key, _ in module.adapter_parameters()}
                if module.owned:  # a task head
                    added |= {f"{name}.weight", f"{name}.bias"}
        return {name: parameter for name, parameter in self.model.named_parameters() if name not in added}

    def fingerprint(self) -> Fingerprint:
        """Hashes each base parameter as it was loaded, in fp32, bf16 and fp16: once, before anything is reordered."""
        if self._fingerprint is None:
            self._fingerprint = fingerprint(self.base_parameters())
        return self._fingerprint

    @property
    def trained_stages(self) -> int:
        """How many stages have ever trained; later ones have no effect yet."""
        return max((m.trained_stages for m in self.elastic() if isinstance(m, ElasticLinear)), default=0)

    # ---- on disk ----------------------------------------------------------------------------------------------------

    def save_pretrained(self, path: str | Path) -> None:
        """Writes the stages, the space, the permutation and a reference to the base; not the base itself.

        The folder then holds `mlfs.json` and the safetensors file that it names. Both are written under new names
        first, so that a save that is cut off leaves what was there.

        Raises:
            MLFSError: `path` is a file, or cannot be written.
        """
        config = self.model.config
        state = SavedState(
            base_name=self.base_name,
            revision=getattr(config, "_commit_hash", None),
            fingerprint=self.fingerprint(),
            architecture=type(self.model).__name__,
            config=config.to_dict(),
            space=self.space.to_dict(),
            rank=self.rank,
            stages=self.stages,
            alpha=self.alpha,
            trained_stages=self.trained_stages,
            owned=sorted(self._owned_modules()),
            permutation=self.permutation,
            parameters=self.own_parameters(),
        )
        write_state(state, Path(path))

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
        state = read_state(Path(path))
        if model is None:
            model = load_base(state.base_name, state.revision, state.architecture, state.config, model_kwargs)
        # before the conversion: a base that is refused stays as it was
        given = type(model).__name__
        if given != state.architecture:
            raise MLFSError(f"{path} was trained on a {state.architecture}, the base given is a {given}")
        # Task heads belong to the run, so that those of the base at hand do not count.
        base = {
            name: parameter
            for name, parameter in model.named_parameters()
            if name in state.fingerprint or name.rpartition(".")[0] not in state.owned
        }
        found = fingerprint(base)
        check_base(found, state.fingerprint, model.dtype, state.base_name, path)
        space = SearchSpace.from_dict(state.space)
        supernet = cls(model, space, state.rank, state.stages, state.alpha, base_name=state.base_name)
        supernet._fingerprint = found
        if state.permutation:
            supernet.apply_permutation(state.permutation)
        supernet._load_parameters(state, path)
        if getattr(model.config, "problem_type", None) is None:  # which training may have found out from its labels
            model.config.problem_type = state.config.get("problem_type")
        return supernet

    def restore(self, path: str | Path) -> None:
        """Loads, in place, what `save_pretrained` wrote of a super-transformer of the same base and shape.

        Raises:
            MLFSError: the folder is missing, half-written or changed, or holds another base, space or rank.
        """
        state = read_state(Path(path))
        saved = {"space": state.space, "rank": state.rank, "stages": state.stages, "alpha": state.alpha}
        own = {"space": self.space.to_dict(), "rank": self.rank, "stages": self.stages, "alpha": self.alpha}
        if odd := [key for key in own if saved[key] != own[key]]:
            raise MLFSError(f"{path} was saved with another {', '.join(odd)}: resume with the options of that run")
        check_base(self.fingerprint(), state.fingerprint, self.model.dtype, state.base_name, path)
        if state.permutation != self.permutation:
            self.apply_permutation(difference(self.permutation, state.permutation))
            self.permutation = state.permutation
        self._load_parameters(state, path)

    def _owned_modules(self) -> Iterator[str]:
        """Yields the names of the modules whose weights belong to the run."""
        for name, module in self.model.named_modules():
            if isinstance(module, Elastic) and module.owned:
                yield name

    def _load_parameters(self, state: SavedState, path: str | Path) -> None:
        """Copies saved parameters into the super-transformer's own."""
        for name, module in self.model.named_modules():
            if isinstance(module, Elastic):
                module.owned = name in state.owned
                if isinstance(module, ElasticLinear):
                    module.trained_stages = min(module.stages, state.trained_stages)
        own, saved = self.own_parameters(), state.parameters
        if own.keys() != saved.keys():
            odd = sorted(own.keys() ^ saved.keys())
            raise MLFSError(
                f"{path} does not fit the model: {len(odd)} tensors are missing or left over, e.g. {odd[0]}"
            )
        with torch.no_grad():
            for name, parameter in own.items():
                if parameter.shape != saved[name].shape:
                    found, expected = tuple(saved[name].shape), tuple(parameter.shape)
                    raise MLFSError(f"{path}: tensor {name} has shape {found}, the model has {expected}")
                parameter.copy_(saved[name])
        self.merge_stages(self.merged_stages)  # the merged copies are made anew, of what was loaded


def _refuse(*_: Any, message: str, **__: Any) -> None:
    raise MLFSError(message)
