"""What a configuration states: the full sizes, the sizes of a subnet, and whether it can state them."""

import copy
from typing import Any

from mlfs.models.families.spec import Embedding, Family, LayerNorm, RMSNorm
from mlfs.space.dimensions import Dimensions
from mlfs.space.search_space import SearchSpace
from mlfs.space.subnet import Subnet


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


def is_exportable(subnet: Subnet, family: Family, dims: Dimensions) -> bool:
    """Whether the family's configuration can state the subnet's sizes, so that its checkpoint loads anywhere."""
    if not subnet.is_uniform:
        return False
    heads = subnet.per_layer("heads")[0]
    if family.head_dim_field:
        return not family.heads_divide_hidden or subnet.hidden % heads == 0
    return subnet.hidden == heads * dims.head_dim


def nearest_exportable(subnet: Subnet, space: SearchSpace, family: Family, dims: Dimensions) -> Subnet | None:
    """The member of `space` with the same layers that can be stated and is nearest in relative sizes."""

    def distance(other: Subnet) -> float:
        gap = abs(other.hidden / subnet.hidden - 1)
        for axis in ("heads", "ffn"):
            mine = sum(subnet.per_layer(axis)) / len(subnet.layers)
            gap += abs(other.per_layer(axis)[0] / mine - 1)
        return gap

    same_depth = (other for other in space.uniform() if other.layers == subnet.layers)
    return min((s for s in same_depth if is_exportable(s, family, dims)), key=distance, default=None)


def small_config(config: Any, subnet: Subnet, family: Family, dims: Dimensions) -> Any:
    """The configuration of the extracted model; of a subnet it cannot state, with the largest of its layers."""
    small = copy.deepcopy(config)
    heads = max(subnet.per_layer("heads"))
    small.hidden_size = subnet.hidden
    small.num_attention_heads = heads
    if getattr(config, "num_key_value_heads", None):
        small.num_key_value_heads = 1 if dims.kv_heads == 1 else heads // dims.group
    if family.head_dim_field:
        small.head_dim = dims.head_dim
    setattr(small, family.ffn_field, max(subnet.per_layer("ffn")))
    small.num_hidden_layers = len(subnet.layers)
    if getattr(config, "layer_types", None):
        small.layer_types = [config.layer_types[i] for i in subnet.layers]
    return small


def why_not_exportable(subnet: Subnet, family: Family, near: Subnet | None) -> str:
    """The sentence a user gets who saves a subnet that no configuration can state."""
    if not subnet.is_uniform:
        reason = "its layers differ in size, and the configuration has one size for all"
    elif family.head_dim_field:
        reason = f"in a {family.model_type} configuration hidden_size must be a multiple of num_attention_heads"
    else:
        reason = (
            f"heads of a {family.model_type} configuration are hidden_size / num_attention_heads wide, and the "
            "subnet's are not"
        )
    advice = (
        f"the nearest subnet that can be saved is {near.to_json()}" if near else "no subnet of this depth can be saved"
    )
    return f"subnet {subnet.to_json()} cannot be saved as a transformers checkpoint: {reason}; {advice}"


def has_final_norm(family: Family) -> bool:
    """Whether a norm follows the last layer: one beside the layers, in a family whose embeddings have none."""
    norms = [name for name, spec in family.outer.items() if isinstance(spec, (LayerNorm, RMSNorm))]
    embeddings = [name.rpartition(".")[0] for name, spec in family.outer.items() if isinstance(spec, Embedding)]
    return any(not name.rpartition(".")[0] or name.rpartition(".")[0] not in embeddings for name in norms)
