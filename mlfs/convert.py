"""Makes a Hugging Face model elastic in place, by reading its family's table entry."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import Cache, PreTrainedModel

from mlfs.blocks import fused_forward, ragged_encoder
from mlfs.elastic import Elastic, ElasticEmbedding, ElasticLayerNorm, ElasticLinear, ElasticRMSNorm
from mlfs.errors import MLFSError
from mlfs.families import Count, Embedding, Family, Fixed, LayerNorm, Linear, Module, RMSNorm, SelfAttention
from mlfs.sizes import Dimensions, Extent, RowSizes, Scope, Sizes


def dimensions(config: Any, family: Family) -> Dimensions:
    """The full sizes a configuration states."""
    heads = config.num_attention_heads
    return Dimensions(
        hidden=config.hidden_size,
        heads=heads,
        kv_heads=getattr(config, "num_key_value_heads", None) or family.kv_heads or heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
        ffn=getattr(config, family.ffn_field, None) or 4 * config.hidden_size,
        layers=config.num_hidden_layers,
    )


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
            part.__class__ = _fused_class(type(part), forward)  # type: ignore[assignment, arg-type]
            fused.add(type(spec))
        attends_by_ranges &= SelfAttention in fused
        _follow(block, scope, {}, layer=i)
        by_owner: dict[str, dict[str, Extent]] = {}
        for path, count in family.sizes.items():
            owner, _, attribute = path.rpartition(".")
            by_owner.setdefault(owner, {})[attribute] = _count(count, dims, i)
        for owner, extents in by_owner.items():
            _follow(block.get_submodule(owner), scope, extents)
    if family.encoder and attends_by_ranges:
        encoder = model.base_model.get_submodule(family.encoder)
        ragged = ragged_encoder(type(encoder).forward)
        encoder.__class__ = _fused_class(type(encoder), ragged)  # type: ignore[assignment, arg-type]
        _follow(encoder, scope, {})
    return layers


def settle(module: nn.Module, sizes: Sizes) -> None:
    """Undoes, on a copy, what made a module follow the active subnet or run fused: its class is the one it had, its
    attributes are those under `sizes`."""
    while isinstance(module, _Remade):
        original: Any = type(module)._original
        _, extents, _ = module.__dict__.pop("_follows", (None, {}, None))
        module.__class__ = original
        for attribute, extent in extents.items():
            setattr(module, attribute, extent(sizes))


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
    hidden = Extent("hidden")
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


def _extent(axis: str, dims: Dimensions, layer: int | None, per_head: int = 1) -> Extent:
    unit = dims.head_dim * per_head if axis in ("heads", "kv_heads") else 1
    return Extent(axis, unit, None if axis == "hidden" else layer)


def _count(count: Count, dims: Dimensions, layer: int) -> Extent:
    return Extent(count.axis, dims.head_dim if count.times_head_dim else 1, layer)


class _Remade:
    """Mixed into the class of a module whose attributes, or whose running at all, depend on the active subnet, or whose
    forward pass is a fused one.

    A subclass made at run time, so that the module stays what it was to everyone else (isinstance, names, hooks) and
    a size is read for the thread that asks.
    """

    _original: type[nn.Module]


@functools.cache
def _fused_class(original: type[nn.Module], forward: Callable[..., Any]) -> type[nn.Module]:
    return _subclass(original, {"forward": functools.wraps(original.forward)(forward)})


def _follow(module: nn.Module, scope: Scope, extents: dict[str, Extent], layer: int | None = None) -> None:
    module.__dict__["_follows"] = (scope, extents, layer)
    module.__class__ = _following_class(type(module), tuple(extents), layer is not None)  # type: ignore[arg-type]


@functools.cache
def _following_class(original: type[nn.Module], attributes: tuple[str, ...], is_layer: bool) -> type[nn.Module]:
    def size(attribute: str) -> property:
        def read(self: Any) -> int:
            scope, extents, _ = self._follows
            return extents[attribute](scope.sizes)

        return property(read, lambda self, value: self.__dict__.update({attribute: value}))

    namespace: dict[str, Any] = {name: size(name) for name in attributes}
    if is_layer:
        namespace |= {"__call__": _call_or_skip, "forward": _forward_under_its_subnet(original)}
    return _subclass(original, namespace)


def _subclass(original: type[nn.Module], namespace: dict[str, Any]) -> type[nn.Module]:
    namespace |= {"_original": original, "__module__": original.__module__, "__doc__": original.__doc__}
    bases = (original,) if issubclass(original, _Remade) else (_Remade, original)
    return type(original.__name__, bases, namespace)


def _call_or_skip(self: Any, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """Runs the layer, or, where the subnet leaves it out, hands its input on."""
    scope, _, layer = self._follows
    sizes = scope.sizes
    if sizes.keeps(layer):
        if self.training and getattr(self, "gradient_checkpointing", False):
            kwargs["_sizes"] = sizes
        out = type(self)._original.__call__(self, hidden_states, *args, **kwargs)
        if isinstance(sizes, RowSizes) and not all(row.keeps(layer) for row in sizes.rows):
            kept = _mask(tuple(row.keeps(layer) for row in sizes.rows), out.device)
            out = torch.where(kept.view(-1, *(1 for _ in out.shape[1:])), out, hidden_states)
        return out
    # A key-value cache tells lengths by any layer: one number per token keeps this one in step.
    for cache in (*args, *kwargs.values()):
        if isinstance(cache, Cache):
            token = hidden_states[..., :1].detach().unsqueeze(1)
            cache.update(token, token, layer)
    return hidden_states


def _mask(kept: tuple[bool, ...], device: torch.device) -> torch.Tensor:
    """`kept` on the device; copied there once, as nothing may be while a CUDA graph is recorded."""
    return torch.tensor(kept, device=device) if torch.compiler.is_compiling() else _remembered_mask(kept, device)


@functools.lru_cache(maxsize=1024)
def _remembered_mask(kept: tuple[bool, ...], device: torch.device) -> torch.Tensor:
    with torch.inference_mode(False):  # autograd keeps it for the backward pass of later calls
        return torch.tensor(kept, device=device)


def _forward_under_its_subnet(original: type[nn.Module]) -> Any:
    """`forward` that gradient checkpointing may run again, later and in another thread, under the same subnet."""

    def forward(self: Any, *args: Any, _sizes: Any = None, **kwargs: Any) -> Any:
        if _sizes is None:
            return original.forward(self, *args, **kwargs)
        with self._follows[0].activate(_sizes):
            return original.forward(self, *args, **kwargs)

    return functools.wraps(original.forward)(forward)
