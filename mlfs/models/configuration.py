"""What a configuration states: the full sizes, the sizes of a subnet, and whether it can state them."""

import copy
from typing import Any

from mlfs.models.families.spec import Embedding, Family, LayerNorm, RMSNorm
from mlfs.space.dimensions import Dimensions, LayerSizes
from mlfs.space.search_space import SearchSpace
from mlfs.space.subnet import Subnet


def dimensions(config: Any, family: Family) -> Dimensions:
    """Reads the full sizes that a configuration states."""
    heads = config.num_attention_heads
    return Dimensions(
        hidden=config.hidden_size,
        heads=heads,
        kv_heads=getattr(config, "num_key_value_heads", None) or family.kv_heads or heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
        ffn=getattr(config, family.ffn_field, None) or 4 * config.hidden_size,
        layers=config.num_hidden_layers,
    )


def is_exportable(subnet: Subnet, family: Family, dims: Dimensions) -> bool:
    """Tells whether the family's configuration can state the subnet's sizes, so that its checkpoint loads anywhere."""
    if not subnet.is_uniform:
        return False
    heads = subnet.per_layer("heads")[0]
    if family.head_dim_field:
        return not family.heads_divide_hidden or subnet.hidden % heads == 0
    return subnet.hidden == heads * dims.head_dim


def nearest_exportable(subnet: Subnet, space: SearchSpace, family: Family, dims: Dimensions) -> Subnet | None:
    """Finds the exportable member of `space` with the same layers that is nearest in relative sizes; None: there is
    none."""

    def distance(other: Subnet) -> float:
        gap = abs(other.hidden / subnet.hidden - 1)
        for axis in ("heads", "ffn"):
            mean = sum(subnet.per_layer(axis)) / subnet.depth
            gap += abs(other.per_layer(axis)[0] / mean - 1)
        return gap

    same_depth = (other for other in space.uniform() if other.layers == subnet.layers)
    exportable = (other for other in same_depth if is_exportable(other, family, dims))
    return min(exportable, key=distance, default=None)


def small_config(config: Any, sizes: LayerSizes, family: Family, dims: Dimensions) -> Any:
    """Makes the configuration of the extracted model.

    Where a subnet's layers differ, which no configuration can state, it has the sizes of the largest.
    """
    small, subnet = copy.deepcopy(config), sizes.subnet
    heads = max(subnet.per_layer("heads"))
    small.hidden_size = subnet.hidden
    small.num_attention_heads = heads
    if getattr(config, "num_key_value_heads", None):
        small.num_key_value_heads = 1 if dims.kv_heads == 1 else heads // dims.group
    if family.head_dim_field:
        small.head_dim = dims.head_dim
    setattr(small, family.ffn_field, max(subnet.per_layer("ffn")))
    small.num_hidden_layers = subnet.depth
    if getattr(config, "layer_types", None):
        small.layer_types = [config.layer_types[i] for i in sizes.layers]
    return small


def why_not_exportable(subnet: Subnet, family: Family, near: Subnet | None) -> str:
    """Makes the sentence that a user gets who saves a subnet that no configuration can state.

    Args:
        near: the nearest one that can be saved, if there is one.
    """
    if not subnet.is_uniform:
        reason = "its layers differ in size, and the configuration has one size for all"
    elif family.head_dim_field:
        reason = f"in a {family.model_type} configuration hidden_size must be a multiple of num_attention_heads"
    else:
        reason = (
            f"heads of a {family.model_type} configuration are hidden_size / num_attention_heads wide, and the "
            "subnet's are not"
        )
    advice = "no subnet of this depth can be saved"
    if near is not None:
        advice = f"the nearest subnet that can be saved is {near.to_json()}"
    return f"subnet {subnet.to_json()} cannot be saved as a transformers checkpoint: {reason}; {advice}"


def has_final_norm(family: Family) -> bool:
    """Tells whether a norm follows the last layer: a norm outside of the layers that is not part of the embeddings."""
    parents_of_embeddings = {_parent(name) for name, spec in family.outer.items() if isinstance(spec, Embedding)}
    norms = [name for name, spec in family.outer.items() if isinstance(spec, (LayerNorm, RMSNorm))]
    # beside embeddings that lie in the model itself, a norm there is the final one
    return any(_parent(name) == "" or _parent(name) not in parents_of_embeddings for name in norms)


def _parent(name: str) -> str:
    return name.rpartition(".")[0]
