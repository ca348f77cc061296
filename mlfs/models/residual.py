"""The residual stream of a model: which norm feeds which projections, and whether the stream may be rotated.

A rotation is an orthogonal change of the basis that the numbers of the stream are written in. It keeps their length,
and so commutes with an RMSNorm whose weight is 1; the weight can be folded into the projections that the norm feeds.
"""

from collections.abc import Mapping

from transformers import PreTrainedModel

from mlfs.models.convert import base_prefix
from mlfs.models.families.spec import Family, LayerNorm, Linear, Module, PreNorm, RMSNorm
from mlfs.space.dimensions import Dimensions


def why_not_rotatable(model: PreTrainedModel, family: Family) -> str | None:
    """Says why the residual stream of a model cannot be rotated, and the way out; None if it can be.

    LayerNorm subtracts the mean, which lies along one fixed direction; and a norm that stands in the stream itself,
    after each sum, scales its numbers one by one. No rotation commutes with either. A LayerNorm before the projections
    could be turned into an RMSNorm, but what is exported would be another architecture then.

    Args:
        model: of the family, elastic or as yet plain.
    """
    specs = [*family.layer.values(), *family.outer.values(), *family.heads.values()]
    reason = ""
    if any(isinstance(spec, LayerNorm) for spec in specs):
        reason = "its LayerNorms subtract a mean, which is another one in another basis"
    elif any(_reads_stream(spec) and not _norm_in_layer(name, family) for name, spec in family.layer.items()):
        reason = "its layers are not known to be s + mlp(norm(s)) for s = x + attention(norm(x))"
    elif len(_final_norms(family)) != 1:
        reason = "the table names no one RMSNorm after its layers"
    elif any(_reads_stream(spec) and spec.writes == "hidden" for spec in specs if isinstance(spec, Linear)):
        reason = "a projection from hidden to hidden, with an activation after it, computes in the basis that it has"
    elif not _heads(model, family):
        reason = "it has no head, and gives what comes out of its last norm as it is: load it with a head"
    if not reason:
        return None
    return (
        f"the residual stream of this {type(model).__name__} cannot be rotated: {reason}; or order the units by "
        "'gradient', 'activation' or 'magnitude'"
    )


def norms_of_readers(model: PreTrainedModel, family: Family, dims: Dimensions) -> dict[str, str]:
    """Names, for each projection of a model that reads the residual stream, the norm that feeds it.

    Args:
        model: one that can be rotated (`why_not_rotatable`), of the family. dims: its full sizes.
    """
    prefix = base_prefix(model)
    found = {}
    for i in range(dims.layers):
        layer = f"{prefix}{family.layers}.{i}."
        for name, spec in family.layer.items():
            if _reads_stream(spec):
                found[layer + name] = layer + _norm_in_layer(name, family)
    (final,) = _final_norms(family)
    return found | dict.fromkeys(_heads(model, family), prefix + final)


def _reads_stream(spec: Module) -> bool:
    return isinstance(spec, Linear) and spec.reads == "hidden"


def _norm_in_layer(name: str, family: Family) -> str:
    """Names the norm that feeds a projection, both by their names in a layer; "" where the table does not say."""
    block = family.fused.get("")
    if not isinstance(block, PreNorm):
        return ""
    norms: Mapping[str, str] = {block.attention: block.norm, block.mlp: block.mlp_norm}
    return next((norm for part, norm in norms.items() if name.startswith(f"{part}.")), "")


def _final_norms(family: Family) -> list[str]:
    return [name for name, spec in family.outer.items() if isinstance(spec, RMSNorm)]


def _heads(model: PreTrainedModel, family: Family) -> list[str]:
    """Names the heads that a model has and that read the residual stream."""
    there = {name for name, _ in model.named_modules()}
    return [name for name, spec in family.heads.items() if name in there and _reads_stream(spec)]
