"""`SuperTransformer`, a Hugging Face model whose subnets share its weights."""

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from mlfs.elastic.base import Elastic
from mlfs.elastic.embedding import ElasticEmbedding
from mlfs.elastic.linear import ElasticLinear
from mlfs.elastic.norm import ElasticNorm
from mlfs.elastic.scope import Scope
from mlfs.elastic.staged import Staged, train_stage
from mlfs.errors import MLFSError
from mlfs.models.configuration import dimensions, is_exportable, nearest_exportable, why_not_exportable
from mlfs.models.convert import AdapterOptions, make_elastic
from mlfs.models.families.table import family_of
from mlfs.models.pretrained import hub_name, load_base, recorded_name
from mlfs.space.depths import as_offered, layers_of_depth
from mlfs.space.dimensions import LayerSizes, RowSizes
from mlfs.space.search_space import SearchSpace
from mlfs.space.subnet import Subnet
from mlfs.supernet.base import (
    config_as_loaded,
    constants,
    new_parameters,
    vocabulary_of_base,
    vocabulary_parameters,
)
from mlfs.supernet.bound import BoundSubnet
from mlfs.supernet.checkpoint import SavedState, read_state, write_state
from mlfs.supernet.classes import hold, show_signature
from mlfs.supernet.count import count_parameters, count_trainable
from mlfs.supernet.extract import extract
from mlfs.supernet.fingerprint import Fingerprint
from mlfs.supernet.loading import check_same, check_whole_base, load_parameters, restore_order
from mlfs.supernet.ordering import Ordered
from mlfs.supernet.permutation import LAYERS, Permutation
from mlfs.supernet.recorded import reads_record_first
from mlfs.supernet.watch import watch_next_optimizer


@reads_record_first
class SuperTransformer(Ordered):
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
        self.base_name = recorded_name(model.name_or_path if base_name is None else base_name)
        self.hub_name = hub_name(self.base_name)
        self.permutation: Permutation = {}
        self.rotation = None
        self.base_ties = getattr(model.config, "tie_word_embeddings", None)
        self.base_vocabulary = vocabulary_of_base(model)
        self.new_parameters = new_parameters(model)
        self.base_constants = constants(model)
        self.stage: int | None = 0 if stages and rank else None
        self.trains_base = False
        self._scope = Scope(self.dimensions.layer_sizes(self.space.max))
        self._fingerprint: Fingerprint | None = None
        adapters = AdapterOptions(rank, stages, alpha)
        layers = make_elastic(model, self.family, self.dimensions, self._scope, adapters)
        self.model = model
        self.layers_name = next(name for name, module in model.named_modules() if module is layers)
        self.new_parameters -= self.head_parameters()
        self.drawn_parameters = frozenset(self._drawn_outside_of_layers())
        self._train_drawn(True)
        hold(model, self)
        show_signature(self)
        watch_next_optimizer(self)

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

        Threads that are started in the block, a pool's among them, run the whole model: give them `bound(subnet)`.

        Raises:
            MLFSError: `subnet` is not in the space.
        """
        with self._scope.activate(self.layer_sizes(subnet)):
            yield self

    @contextmanager
    def activate_sizes(self, sizes: LayerSizes) -> Iterator["SuperTransformer"]:
        """Runs a size inside the block that the space need not have, spelled out by `Dimensions.layer_sizes`."""
        with self._scope.activate(sizes):
            yield self

    def bound(self, subnet: Subnet) -> BoundSubnet:
        """Makes a view of the model that always runs `subnet`: from any thread, whatever is active there.

        It is called, and generates, as the Hugging Face model; see `BoundSubnet`. Nothing is copied.

        Raises:
            MLFSError: `subnet` is not in the space.
        """
        return BoundSubnet(self, subnet)

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

    @property
    def has_row_sizes(self) -> bool:
        """Whether rows of a batch have sizes of their own now: inside of `activate_rows`."""
        return isinstance(self._scope.sizes, RowSizes)

    def layer_sizes(self, subnet: Subnet) -> LayerSizes:
        """Spells `subnet` out for each layer; it is checked once, then remembered.

        Raises:
            MLFSError: `subnet` is not in the space, or no Subnet.
        """
        if not isinstance(subnet, Subnet):
            raise MLFSError(f"expected a Subnet, got {type(subnet).__name__}: {subnet!r}")
        self._scope.refresh_record()  # another order of the layers may have been loaded
        sizes = self._layer_sizes.get(subnet)
        if sizes is None:
            ranking = self._permutation.get(LAYERS)
            offered = as_offered(subnet, self.space, ranking)
            self.space.check(offered)
            if len(self._layer_sizes) >= 10_000:  # a long run samples without end
                self._layer_sizes.clear()
            kept = layers_of_depth(offered.depth, self.space, ranking) if self.space.counts_layers else None
            sizes = self._layer_sizes[subnet] = self.dimensions.layer_sizes(offered, kept)
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
        subnet = self.layer_sizes(subnet).subnet
        nearest = nearest_exportable(subnet, self.space, self.family, self.dimensions)
        return why_not_exportable(subnet, self.family, nearest)

    def count_parameters(self, subnet: Subnet) -> int:
        """Counts the parameters of `extract(subnet)`, each tied one once."""
        return count_parameters(self.model, self.layers_name, self.layer_sizes(subnet))

    def count_trainable(self, subnet: Subnet) -> int:
        """Counts the parameters that now train and that `subnet` uses: the n_j of gradient scaling."""
        return count_trainable(self.model, self.layers_name, self.layer_sizes(subnet))

    # ---- stages -----------------------------------------------------------------------------------------------------

    def train_stage(
        self, stage: int | None, head: bool = True, norms: bool = False, base: bool = False, embeddings: bool = False
    ) -> None:
        """Lets only the adapters of `stage` train (None: of no stage); the task head, norms and embeddings as asked.

        With the head trains what loading the base drew at random, as a pooler that its checkpoint does not have. What
        of the base trains belongs to the run from then on, and is saved with it.

        Args:
            base: whether all weights of the model train instead of the adapters.

        Raises:
            MLFSError: there is no such stage; or the base trains while stages are merged into a copy of it.
        """
        if stage is not None and not 0 <= stage < self.stages:
            raise MLFSError(f"stage={stage}: this super-transformer has stages 0 to {self.stages - 1}")
        if base and self.merged_stages:
            raise MLFSError("stages are merged into a copy of the base, which would not train: merge_stages(0) first")
        if norms or embeddings or base:
            self.fingerprint()  # of the base as it was loaded
        train_stage(self.model, None if base else stage)
        self.stage = stage
        self._train_base(base)
        for module in self.elastic():
            if isinstance(module, (ElasticNorm, ElasticEmbedding)) and not base:
                trains = norms if isinstance(module, ElasticNorm) else embeddings
                module.train_base(trains)
                module.owned |= trains
            elif module.is_head:
                module.train_base(head)
        self._train_drawn(head or base)
        self.record.write()
        watch_next_optimizer(self)

    def _drawn_outside_of_layers(self) -> Iterator[str]:
        """Names what the base's checkpoint lacks of linear layers between its layers and the head: poolers and such."""
        for name in self.new_parameters:
            owner = self.model.get_submodule(name.rpartition(".")[0])
            if isinstance(owner, ElasticLinear) and not name.startswith(f"{self.layers_name}."):
                yield name

    def _train_drawn(self, trains: bool) -> None:
        """Lets what loading the base drew at random, such as a missing pooler, train with the head it belongs to."""
        for name in self.drawn_parameters:
            module, _, key = name.rpartition(".")
            owner: Any = self.model.get_submodule(module)
            if trains:
                owner.merge_stages(0)  # what trains is not read from a copy
            owner.get_parameter(key).requires_grad_(trains)

    def _train_base(self, trains: bool) -> None:
        """Lets all that the model computes with, but heads and stages, train, or freezes it again."""
        if not trains and not self.trains_base:
            return
        self.trains_base = trains
        base = self.base_parameters() | {name: self.model.get_parameter(name) for name in self.new_parameters}
        for parameter in base.values():
            parameter.requires_grad_(trains)
        if trains:
            self.new_parameters = self.new_parameters | base.keys()
            for module in self.elastic():
                if isinstance(module, Staged):
                    module.forget_idle_stages()

    def merge_stages(self, stages: int) -> None:
        """Merges the first `stages` stages into an fp32 copy of the projections, which is read instead; 0: undoes it.

        The base itself is not touched, and is what is saved. What was drawn at random and trains is read as it is.
        """
        for name, module in self.model.named_modules():
            if isinstance(module, Staged) and module.stages:
                is_drawn = f"{name}.weight" in self.drawn_parameters and module.own_weight.requires_grad
                module.merge_stages(0 if is_drawn else stages)

    @property
    def merged_stages(self) -> int:
        """How many stages are merged into the copy that is read now."""
        return max((m.merged_stages for m in self.elastic() if isinstance(m, Staged)), default=0)

    # ---- what is whose ----------------------------------------------------------------------------------------------

    def elastic(self) -> Iterator[Elastic]:
        """Yields every elastic module."""
        return (module for module in self.model.modules() if isinstance(module, Elastic))

    def own_parameters(self) -> dict[str, nn.Parameter]:
        """Collects what belongs to a run, by the model's names.

        That is the stages, task heads and norms that trained, and what the base's checkpoint did not have.
        """
        own: dict[str, nn.Parameter] = {}
        for name, module in self.model.named_modules():
            if not isinstance(module, Elastic):
                continue
            if isinstance(module, Staged):
                own |= {f"{name}.{key}": parameter for key, parameter in module.adapter_parameters()}
            if module.owned:
                own |= _weight_and_bias(name, module)
        return own | {name: self.model.get_parameter(name) for name in sorted(self.new_parameters)}

    def base_parameters(self) -> dict[str, nn.Parameter]:
        """Collects the parameters that the base came with, but for task heads; each tied one once."""
        added = self.new_parameters | self.head_parameters()
        for name, module in self.model.named_modules():
            if isinstance(module, Staged):
                added |= {f"{name}.{key}" for key, _ in module.adapter_parameters()}
        return {name: parameter for name, parameter in self.model.named_parameters() if name not in added}

    def head_parameters(self) -> set[str]:
        """Names the weights and biases of heads that are new for the task."""
        modules = self.model.named_modules()
        heads = (_weight_and_bias(name, m) for name, m in modules if isinstance(m, Elastic) and m.is_head)
        return {name for head in heads for name in head}

    # ---- on disk ----------------------------------------------------------------------------------------------------

    def save_pretrained(self, path: str | Path) -> None:
        """Writes the stages, the space, the permutation and a reference to the base; not the base itself.

        The folder then holds `mlfs.json` and the safetensors file that it names. Both are written under new names
        first, so that a save that is cut off leaves what was there.

        Raises:
            MLFSError: `path` is a file, or cannot be written.
        """
        found = self.fingerprint()
        state = SavedState(
            base_name=self.base_name,
            hub_name=self.hub_name,
            revision=getattr(self.model.config, "_commit_hash", None),
            fingerprint=found,
            constants=self.base_constants,
            vocabulary=self.base_vocabulary,
            architecture=type(self.model).__name__,
            config=config_as_loaded(self),
            space=self.space.to_dict(),
            rank=self.rank,
            stages=self.stages,
            alpha=self.alpha,
            trained_stages=self.trained_stages,
            owned=sorted({*self.owned_modules(), *self.new_parameters}),
            permutation=self.permutation,
            rotation=self.rotation,
            parameters=self.own_parameters() | self.added_rows(),
        )
        write_state(state, Path(path))

    @classmethod
    def from_pretrained(
        cls, path: str | Path, model: PreTrainedModel | str | Path | None = None, **model_kwargs: Any
    ) -> "SuperTransformer":
        """Restores what `save_pretrained` wrote, exactly.

        Args:
            path: the folder.
            model: the base, if it is at hand, or where it is (a Hub name or a folder); else it is loaded from where it
                came. `model_kwargs` are for loading it.

        Raises:
            MLFSError: the folder is missing, half-written or changed, or the base is not the one it was trained on.
        """
        state = read_state(Path(path))
        if isinstance(model, (str, Path)):
            state = replace(state, base_name=recorded_name(str(model)), hub_name=None, revision=None)
        if model is None or isinstance(model, (str, Path)):
            where = (state.base_name, state.revision)
            model = load_base(*where, state.architecture, state.config_of_base, model_kwargs, state.hub_name)
        found = check_whole_base(model, state, path)  # before the conversion: a base that is refused stays as it was
        if state.vocabulary:
            model.resize_token_embeddings(state.config["vocab_size"], mean_resizing=False)
            model.config.update(state.token_ids)
        space = SearchSpace.from_dict(state.space)
        supernet = cls(model, space, state.rank, state.stages, state.alpha, base_name=state.base_name)
        supernet.hub_name = supernet.hub_name or state.hub_name
        supernet.base_vocabulary, supernet._fingerprint = state.vocabulary, found
        restore_order(supernet, state, path)
        load_parameters(supernet, state, path)
        return supernet

    def restore(self, path: str | Path) -> None:
        """Loads, in place, what `save_pretrained` wrote of a super-transformer of the same base and shape.

        Raises:
            MLFSError: the folder is missing, half-written or changed, or holds another base, space or rank; or the
                super-transformer is rotated, and not as there.
        """
        state = read_state(Path(path))
        found = check_same(self, state, path)
        restore_order(self, state, path)
        self._fingerprint = found
        load_parameters(self, state, path)

    def owned_modules(self) -> Iterator[str]:
        """Yields the names of the modules whose weights belong to the run."""
        for name, module in self.model.named_modules():
            if isinstance(module, Elastic) and module.owned:
                yield name

    def added_rows(self) -> dict[str, Tensor]:
        """Collects the rows of tokens that the base does not have, as views, of parameters that are not the run's."""
        start, own = self.base_vocabulary, self.own_parameters()
        if not start:
            return {}
        resized = vocabulary_parameters(self.model)
        return {f"{name}.added_rows": p.detach()[start:] for name, p in resized.items() if name not in own}


def _weight_and_bias(name: str, module: Elastic) -> dict[str, nn.Parameter]:
    """Names the weight and bias of a module of the model, as far as it has them."""
    both = {f"{name}.weight": module.own_weight, f"{name}.bias": module.own_bias}
    return {key: parameter for key, parameter in both.items() if parameter is not None}


def _refuse(*_: Any, message: str, **__: Any) -> None:
    raise MLFSError(message)
