"""Takes a subnet out of a super-transformer as a plain transformers model."""

import copy
import functools
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import PreTrainedModel

from mlfs.convert import settle
from mlfs.elastic import Elastic
from mlfs.errors import MLFSError
from mlfs.families import Family
from mlfs.sizes import Dimensions
from mlfs.subnet import SearchSpace, Subnet

if TYPE_CHECKING:
    from mlfs.supernet import SuperTransformer


def is_expressible(subnet: Subnet, family: Family, dims: Dimensions) -> bool:
    """Whether the family's configuration can state the subnet's sizes, so that its checkpoint loads anywhere."""
    if not subnet.is_uniform:
        return False
    heads = subnet.per_layer("heads")[0]
    if family.head_dim_field:
        return not family.heads_divide_hidden or subnet.hidden % heads == 0
    return subnet.hidden == heads * dims.head_dim


def nearest_expressible(subnet: Subnet, space: SearchSpace, family: Family, dims: Dimensions) -> Subnet | None:
    """The member of `space` with the same layers that can be stated and is nearest in relative sizes."""

    def distance(other: Subnet) -> float:
        gap = abs(other.hidden / subnet.hidden - 1)
        for axis in ("heads", "ffn"):
            mine = sum(subnet.per_layer(axis)) / len(subnet.layers)
            gap += abs(other.per_layer(axis)[0] / mine - 1)
        return gap

    same_depth = (other for other in space.uniform() if other.layers == subnet.layers)
    return min((s for s in same_depth if is_expressible(s, family, dims)), key=distance, default=None)


@torch.no_grad()
def extract(supernet: "SuperTransformer", subnet: Subnet) -> PreTrainedModel:
    """A model of the same class with only the subnet's weights, the stages merged; see `SuperTransformer.extract`."""
    model, dims, family = supernet.model, supernet.dimensions, supernet.family
    sizes = supernet.sizes(subnet)
    # deepcopy keeps every reference inside the model right; the memo puts smaller modules where elastic ones stand.
    memo: dict[int, Any] = {id(model.config): small_config(model.config, subnet, family, dims)}
    prefix = f"{supernet.layers_name}."
    dropped = tuple(f"{prefix}{i}." for i in range(dims.layers) if i not in subnet.layers)
    for name, module in model.named_modules():
        if isinstance(module, Elastic) and not name.startswith(dropped):
            memo[id(module)] = module.extract(sizes)
    kept = nn.ModuleList(copy.deepcopy(supernet.layers[i], memo) for i in subnet.layers)
    memo[id(supernet.layers)] = kept
    small = copy.deepcopy(model, memo)
    for module in small.modules():
        settle(module, sizes)
    for i, block in enumerate(kept):
        for module in block.modules():
            if "layer_idx" in module.__dict__:
                module.layer_idx = i  # type: ignore[assignment]
    if any(getattr(module, "gradient_checkpointing", False) for module in small.modules()):
        # transformers before 5.21 has only the older name
        getattr(small, "activation_checkpointing_disable", small.gradient_checkpointing_disable)()
    for name in ("forward", "_original_forward"):  # an autocast wrapper that accelerate put on the instance
        small.__dict__.pop(name, None)
    small.tie_weights()
    small.requires_grad_(True)
    if not is_expressible(subnet, family, dims):
        near = nearest_expressible(subnet, supernet.space, family, dims)
        # Saved anyway, it would load as a model with other sizes and random weights.
        refuse = functools.partial(_refuse, message=why_inexpressible(subnet, family, near))
        vars(small).update(save_pretrained=refuse, push_to_hub=refuse)
    return small


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


def why_inexpressible(subnet: Subnet, family: Family, near: Subnet | None) -> str:
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


def _refuse(*_: Any, message: str, **__: Any) -> None:
    raise MLFSError(message)
