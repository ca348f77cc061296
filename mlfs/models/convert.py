"""Makes a Hugging Face model elastic in place, by reading its family's table entry."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from transformers import PreTrainedModel

from mlfs.elastic.base import Elastic
from mlfs.elastic.embedding import ElasticEmbedding
from mlfs.elastic.linear import ElasticLinear
from mlfs.elastic.norm import ElasticLayerNorm, ElasticRMSNorm
from mlfs.elastic.scope import Scope
from mlfs.elastic.source import why_not_plain
from mlfs.elastic.staged import Staged
from mlfs.errors import MLFSError
from mlfs.models.families.spec import Embedding, Family, Fixed, LayerNorm, Linear, Module, RMSNorm, SelfAttention
from mlfs.models.follow import Forward, follow
from mlfs.models.fused.forward import check_kind, encoder_forward, fused_forward
from mlfs.space.dimensions import AxisSize, Dimensions


@dataclass(frozen=True)
class AdapterOptions:
    """What every adapted layer gets: `stages` low-rank stages of rank `rank`, of scale alpha / rank."""

    rank: int
    stages: int
    alpha: float


def make_elastic(
    model: PreTrainedModel, family: Family, dims: Dimensions, scope: Scope, adapters: AdapterOptions
) -> nn.ModuleList:
    """Replaces the modules that the table names by elastic ones that share their storage.

    Args:
        model: of the family; it is changed in place.
        dims: its full sizes. scope: of the active subnet, which the modules follow.
        adapters: of the linear layers.

    Returns:
        The model's list of layers.

    Raises:
        MLFSError: the model has parameters that the table does not name, or shapes that its configuration does not
            give; or the table names what the model does not have. Nothing has been replaced.
    """
    trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        elastic = _elastic_modules(model, family, dims, scope, adapters)
        layers = _layers_of(model, family)
    except MLFSError:
        for parameter, trains in trained:
            parameter.requires_grad_(trains)
        raise
    _freeze_the_base(model, elastic)
    _train_the_first_stage(elastic)
    _put_in_place(model, elastic)
    fused = [_follow_in_layer(layer, i, family, dims, scope) for i, layer in enumerate(layers)]
    if family.encoder and all(_attends_within_ranges(family, forwards) for forwards in fused):
        encoder = model.base_model.get_submodule(family.encoder)
        own_class: Any = type(encoder)
        follow(encoder, scope, {}, forward=encoder_forward(own_class))
    return layers


# ---- what stands for each module ------------------------------------------------------------------------------------


def _elastic_modules(
    model: PreTrainedModel, family: Family, dims: Dimensions, scope: Scope, adapters: AdapterOptions
) -> dict[str, Elastic]:
    """Makes what stands for each module of the model, by name; the model is not changed."""
    entries = _entries(model, family, dims)
    elastic: dict[str, Elastic] = {}
    for name, module in model.named_modules():
        _refuse_what_is_not_plain(name, module)
        if all(parameter is None for parameter in module._parameters.values()):
            if name in entries and not any(True for _ in module.parameters()):
                raise MLFSError(
                    f"module {name!r} ({type(module).__name__}) has no parameters: its weights are quantised or kept "
                    "otherwise; load the model in fp32, bf16 or fp16"
                )
            continue
        if name not in entries:
            raise MLFSError(
                f"module {name!r} ({type(module).__name__}) is not in the table of family {family.model_type!r}: "
                "this kind of head or layer is not supported; add it to the entry (see 'Add a family')"
            )
        spec, layer = entries[name]
        if isinstance(spec, Fixed):
            continue
        try:
            elastic[name] = _elastic_module(module, spec, layer, dims, scope, adapters)
        except MLFSError as error:
            raise MLFSError(f"{name}: {error}") from None
    return elastic


def _refuse_what_is_not_plain(name: str, module: nn.Module) -> None:
    """Raises MLFSError for a module that is elastic already, or that another library has put in."""
    if isinstance(module, Elastic):
        raise MLFSError("this model is elastic already: use its SuperTransformer, or load the model anew")
    if type(module).__module__.partition(".")[0] == "peft":
        raise MLFSError(
            f"PEFT's adapters are in this model ({type(module).__name__}): take the plain model that "
            "peft_model.merge_and_unload() returns (of prompt tuning: get_base_model())"
        )
    if reason := why_not_plain(module):
        raise MLFSError(f"module {name!r} ({type(module).__name__}): {reason}")
    for key, parameter in module._parameters.items():
        if parameter is not None and not _is_plain(parameter):
            raise MLFSError(
                f"parameter {name}.{key} is {type(parameter.data).__name__}, not a plain tensor of floating-point "
                "numbers: load the model in fp32, bf16 or fp16, neither quantised nor distributed"
            )


def _is_plain(parameter: Any) -> bool:
    # a meta or fake tensor stands for a plain one
    return type(parameter.data) in (Tensor, nn.Parameter, FakeTensor) and parameter.is_floating_point()


def _entries(model: PreTrainedModel, family: Family, dims: Dimensions) -> dict[str, tuple[Module, int | None]]:
    """Returns the table's word for each module, by name in the model, and the number of the layer that it is in."""
    prefix = base_prefix(model)
    entries: dict[str, tuple[Module, int | None]] = {}
    for name, spec in family.outer.items():
        entries[f"{prefix}{name}"] = spec, None
    for i in range(dims.layers):
        for name, spec in family.layer.items():
            entries[f"{prefix}{family.layers}.{i}.{name}"] = spec, i
    for name, spec in family.heads.items():
        entries[name] = spec, None
    return entries


def base_prefix(model: PreTrainedModel) -> str:
    """Returns how the names of the base model's modules begin in `model`: with "model." in most, "" in a base model."""
    return "" if model.base_model is model else f"{model.base_model_prefix}."


def _elastic_module(
    module: nn.Module, spec: Module, layer: int | None, dims: Dimensions, scope: Scope, adapters: AdapterOptions
) -> Elastic:
    """Makes what stands for one module, and lets it follow its axes."""
    if isinstance(spec, Linear):
        return _elastic_linear(module, spec, layer, dims, scope, adapters)
    made: Elastic
    if isinstance(spec, Embedding) and type(module) is nn.Embedding:
        made = ElasticEmbedding.from_embedding(module)
    elif isinstance(spec, LayerNorm) and isinstance(module, nn.LayerNorm):
        made = ElasticLayerNorm.from_layer_norm(module)
    elif isinstance(spec, RMSNorm):
        made = ElasticRMSNorm.from_rms_norm(module)
    else:
        raise MLFSError(f"a {type(module).__name__}, where the table says {type(spec).__name__}")
    made.bind(scope, AxisSize("hidden"))
    return made


def _elastic_linear(
    module: nn.Module, spec: Linear, layer: int | None, dims: Dimensions, scope: Scope, adapters: AdapterOptions
) -> ElasticLinear:
    rank = adapters.rank if spec.adapter else 0
    made = ElasticLinear.from_linear(module, rank, adapters.stages, adapters.alpha, train_base=spec.task)
    made.owned = made.is_head = spec.task
    writes = spec.writes if isinstance(spec.writes, tuple) else (spec.writes,)
    outputs = [_axis_size(axis, dims, layer, spec.per_head) for axis in writes if axis is not None]
    reads = _axis_size(spec.reads, dims, layer) if spec.reads else None
    made.bind(scope, *outputs, reads=reads)
    return made


def _axis_size(axis: str, dims: Dimensions, layer: int | None, per_head: int = 1) -> AxisSize:
    if axis == "hidden":  # the same in all layers
        return AxisSize(axis)
    if axis in ("heads", "kv_heads"):
        return AxisSize(axis, dims.head_dim * per_head, layer)
    return AxisSize(axis, 1, layer)


def _layers_of(model: PreTrainedModel, family: Family) -> nn.ModuleList:
    """Returns the model's list of layers. Raises MLFSError if the table names attributes that its layers do not have,
    or a kind of fused block that is not registered."""
    layers = model.base_model.get_submodule(family.layers)
    assert isinstance(layers, nn.ModuleList)
    for path in family.head_counts:
        owner, _, attribute = path.rpartition(".")
        if not hasattr(layers[0].get_submodule(owner), attribute):
            raise MLFSError(f"the table of family {family.model_type!r} names {path}, which its layers do not have")
    for block in family.fused.values():
        check_kind(block)
    return layers


# ---- into the model -------------------------------------------------------------------------------------------------


def _freeze_the_base(model: PreTrainedModel, elastic: dict[str, Elastic]) -> None:
    """Freezes all of the model's parameters but those of heads that are new for the task."""
    owned = {parameter for module in elastic.values() if module.owned for parameter in module.parameters()}
    for parameter in model.parameters():
        if parameter not in owned:
            parameter.requires_grad_(False)


def _train_the_first_stage(elastic: dict[str, Elastic]) -> None:
    for module in elastic.values():
        if isinstance(module, Staged) and module.stages:
            module.train_stage(0)


def _put_in_place(model: PreTrainedModel, elastic: dict[str, Elastic]) -> None:
    for name, module in elastic.items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, module)


# ---- layers that follow the active subnet ---------------------------------------------------------------------------


def _follow_in_layer(layer: nn.Module, number: int, family: Family, dims: Dimensions, scope: Scope) -> set[str]:
    """Makes a layer, and the modules in it that need to, follow the active subnet. Returns the paths of those that run
    fused."""
    forwards = dict(_fused_forwards(layer, family))
    attributes = _attributes(number, family, dims)
    for path in sorted({"", *forwards, *attributes}):
        module = layer.get_submodule(path)
        number_or_none = number if path == "" else None
        follow(module, scope, attributes.get(path, {}), forwards.get(path), layer=number_or_none)
    return set(forwards)


def _fused_forwards(layer: nn.Module, family: Family) -> Iterator[tuple[str, Forward]]:
    """Yields the path and forward pass of each fused block of a layer, up to the first that has to run as it is: those
    that come after it are made of it."""
    for path, block in family.fused.items():
        forward = fused_forward(layer.get_submodule(path), block)
        if forward is None:
            return
        yield path, forward


def _attributes(layer: int, family: Family, dims: Dimensions) -> dict[str, dict[str, AxisSize]]:
    """Returns the attributes that follow the active subnet, by the path in the layer of the module that has them."""
    by_module: dict[str, dict[str, AxisSize]] = {}
    for path, count in family.head_counts.items():
        module, _, attribute = path.rpartition(".")
        unit = dims.head_dim if count.times_head_dim else 1
        by_module.setdefault(module, {})[attribute] = AxisSize(count.axis, unit, layer)
    return by_module


def _attends_within_ranges(family: Family, paths: set[str]) -> bool:
    """Tells whether a layer whose blocks at `paths` run fused takes ranges in place of an attention mask."""
    return any(isinstance(family.fused[path], SelfAttention) for path in paths)
