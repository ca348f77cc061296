"""Makes a Hugging Face model elastic in place, by reading its family's table entry."""

from torch import nn
from transformers import PreTrainedModel

from mlfs.elastic.base import Elastic
from mlfs.elastic.embedding import ElasticEmbedding
from mlfs.elastic.linear import ElasticLinear
from mlfs.elastic.norm import ElasticLayerNorm, ElasticRMSNorm
from mlfs.elastic.scope import Scope
from mlfs.errors import MLFSError
from mlfs.models.families.spec import Count, Embedding, Family, Fixed, LayerNorm, Linear, Module, RMSNorm, SelfAttention
from mlfs.models.follow import follow, fused_class
from mlfs.models.fused.forward import fused_forward
from mlfs.models.fused.padding import ragged_encoder
from mlfs.space.dimensions import AxisSize, Dimensions


def make_elastic(
    model: PreTrainedModel, family: Family, dims: Dimensions, scope: Scope, rank: int, stages: int, alpha: float
) -> nn.ModuleList:
    """Replaces the modules the table names by elastic ones that share their storage; returns the list of layers.

    Raises MLFSError, having replaced nothing, where the model has parameters that the table does not name, or shapes
    that its configuration does not give.
    """
    trained = [(p, p.requires_grad) for p in model.parameters()]
    try:
        elastic = _elastic_modules(model, family, dims, scope, rank, stages, alpha)
        layers = model.base_model.get_submodule(family.layers)
        assert isinstance(layers, nn.ModuleList)
        for path in family.sizes:
            owner, _, attribute = path.rpartition(".")
            if not hasattr(layers[0].get_submodule(owner), attribute):
                raise MLFSError(f"the table of family {family.model_type!r} names {path}, which its layers do not have")
    except MLFSError:
        for parameter, trains in trained:
            parameter.requires_grad_(trains)
        raise
    for parameter in model.parameters():
        if not any(parameter is own for module in elastic.values() if module.owned for own in module.parameters()):
            parameter.requires_grad_(False)
    for module in elastic.values():
        if isinstance(module, ElasticLinear) and module.stages:
            module.train_stage(0)
    for name, module in elastic.items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, module)
    attends_by_ranges = True
    for i, block in enumerate(layers):
        fused = set()
        for path, spec in family.blocks.items():
            part = block.get_submodule(path)
            if (forward := fused_forward(part, spec)) is None:
                break
            part.__class__ = fused_class(type(part), forward)  # type: ignore[assignment, arg-type]
            fused.add(type(spec))
        attends_by_ranges &= SelfAttention in fused
        follow(block, scope, {}, layer=i)
        by_owner: dict[str, dict[str, AxisSize]] = {}
        for path, count in family.sizes.items():
            owner, _, attribute = path.rpartition(".")
            by_owner.setdefault(owner, {})[attribute] = _count(count, dims, i)
        for owner, extents in by_owner.items():
            follow(block.get_submodule(owner), scope, extents)
    if family.encoder and attends_by_ranges:
        encoder = model.base_model.get_submodule(family.encoder)
        ragged = ragged_encoder(type(encoder).forward)
        encoder.__class__ = fused_class(type(encoder), ragged)  # type: ignore[assignment, arg-type]
        follow(encoder, scope, {})
    return layers


def _elastic_modules(
    model: PreTrainedModel, family: Family, dims: Dimensions, scope: Scope, rank: int, stages: int, alpha: float
) -> dict[str, Elastic]:
    """What stands for each module of the model, by name."""
    names = _names(model, family, dims)
    elastic: dict[str, Elastic] = {}
    for name, module in model.named_modules():
        if isinstance(module, Elastic):
            raise MLFSError("this model is elastic already: use its SuperTransformer, or load the model anew")
        if not any(p is not None for p in module._parameters.values()):
            continue
        if name not in names:
            raise MLFSError(
                f"module {name!r} ({type(module).__name__}) is not in the table of family {family.model_type!r}: "
                "this kind of head or layer is not supported; add it to the entry (see 'Add a family')"
            )
        spec, layer = names[name]
        if isinstance(spec, Fixed):
            continue
        try:
            elastic[name] = _make(module, spec, layer, dims, scope, rank, stages, alpha)
        except MLFSError as error:
            raise MLFSError(f"{name}: {error}") from None
    return elastic


def _names(model: PreTrainedModel, family: Family, dims: Dimensions) -> dict[str, tuple[Module, int | None]]:
    prefix = "" if model.base_model is model else f"{model.base_model_prefix}."
    names: dict[str, tuple[Module, int | None]] = {prefix + name: (spec, None) for name, spec in family.outer.items()}
    for i in range(dims.layers):
        names |= {f"{prefix}{family.layers}.{i}.{name}": (spec, i) for name, spec in family.layer.items()}
    return names | {name: (spec, None) for name, spec in family.heads.items()}


def _make(
    module: nn.Module,
    spec: Module,
    layer: int | None,
    dims: Dimensions,
    scope: Scope,
    rank: int,
    stages: int,
    alpha: float,
) -> Elastic:
    hidden = AxisSize("hidden")
    made: Elastic
    if isinstance(spec, Linear):
        linear = ElasticLinear.from_linear(module, rank if spec.adapter else 0, stages, alpha, train_base=spec.task)
        linear.owned = spec.task
        writes = spec.writes if isinstance(spec.writes, tuple) else (spec.writes,)
        extents = [_extent(axis, dims, layer, spec.per_head) for axis in writes if axis is not None]
        linear.bind(scope, *extents, reads=_extent(spec.reads, dims, layer) if spec.reads else None)
        return linear
    if isinstance(spec, Embedding) and type(module) is nn.Embedding:
        made = ElasticEmbedding.from_embedding(module)
    elif isinstance(spec, LayerNorm) and isinstance(module, nn.LayerNorm):
        made = ElasticLayerNorm.from_layer_norm(module)
    elif isinstance(spec, RMSNorm):
        made = ElasticRMSNorm.from_rms_norm(module)
    else:
        raise MLFSError(f"a {type(module).__name__}, where the table says {type(spec).__name__}")
    made.bind(scope, hidden)
    return made


def _extent(axis: str, dims: Dimensions, layer: int | None, per_head: int = 1) -> AxisSize:
    unit = dims.head_dim * per_head if axis in ("heads", "kv_heads") else 1
    return AxisSize(axis, unit, None if axis == "hidden" else layer)


def _count(count: Count, dims: Dimensions, layer: int) -> AxisSize:
    return AxisSize(count.axis, dims.head_dim if count.times_head_dim else 1, layer)
