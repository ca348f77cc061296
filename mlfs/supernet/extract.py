"""Takes a subnet out of an elastic model as a plain transformers model."""

import copy
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from mlfs.elastic.base import Elastic
from mlfs.models.configuration import small_config
from mlfs.models.families.spec import Family
from mlfs.models.follow import settle
from mlfs.space.dimensions import Dimensions, LayerSizes
from mlfs.supernet.classes import leave_out_of_copies, release


@torch.no_grad()
def extract(
    model: PreTrainedModel, layers_name: str, sizes: LayerSizes, family: Family, dims: Dimensions
) -> PreTrainedModel:
    """Makes a model of the same class with only the weights that the subnet keeps, the stages merged into them.

    Args:
        model: an elastic model, which stays as it is.
        layers_name: the name in `model` of its list of layers.
        sizes: the subnet, spelled out per layer.
        family, dims: of `model`; they say what the small model's configuration states.

    Returns:
        A plain transformers model with weights of its own, in the base's dtype, in which everything trains.
    """
    layers = model.get_submodule(layers_name)
    assert isinstance(layers, nn.ModuleList)
    # deepcopy keeps every reference inside the model right; the memo puts smaller modules where elastic ones stand.
    memo: dict[int, Any] = {id(model.config): small_config(model.config, sizes, family, dims)}
    memo |= leave_out_of_copies(model)
    dropped = tuple(f"{layers_name}.{i}." for i in range(dims.layers) if not sizes.keeps(i))
    for name, module in model.named_modules():
        if isinstance(module, Elastic) and not name.startswith(dropped):
            memo[id(module)] = module.extract_at(sizes)
    kept = nn.ModuleList(copy.deepcopy(layers[i], memo) for i in sizes.layers)
    memo[id(layers)] = kept
    small = copy.deepcopy(model, memo)
    release(small)
    for module in small.modules():
        settle(module, sizes)
    for i, layer in enumerate(kept):
        for module in layer.modules():
            if "layer_idx" in module.__dict__:
                module.layer_idx = i  # type: ignore[assignment]
    if any(getattr(module, "gradient_checkpointing", False) for module in small.modules()):
        # transformers before 5.21 has only the older name
        getattr(small, "activation_checkpointing_disable", small.gradient_checkpointing_disable)()
    for name in ("forward", "_original_forward"):  # an autocast wrapper that accelerate put on the instance
        small.__dict__.pop(name, None)
    small.tie_weights()
    small.requires_grad_(True)
    return small
