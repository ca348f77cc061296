"""Learning rates of parts of a model: what of the pretrained weights trains takes smaller steps than adapters do."""

from collections.abc import Collection

import torch
from torch import nn

from mlfs.elastic.embedding import ElasticEmbedding
from mlfs.elastic.norm import ElasticNorm
from mlfs.supernet.model import SuperTransformer


def pretrained_that_train(supernet: SuperTransformer) -> list[nn.Parameter]:
    """Collects the norms and embeddings that train now."""
    modules = (module for module in supernet.elastic() if isinstance(module, (ElasticNorm, ElasticEmbedding)))
    return [p for module in modules for p in (module.own_weight, module.own_bias) if p is not None and p.requires_grad]


def give_rate(optimizer: torch.optim.Optimizer, parameters: Collection[nn.Parameter], rate: float) -> None:
    """Has an optimizer, before its first step, train some of its parameters at a rate of their own.

    They get groups of their own where a group holds others too; what else a group says stays as it is.
    """
    chosen = {id(parameter) for parameter in parameters}
    for group in list(optimizer.param_groups):
        if group["lr"] == rate:  # it stays whole, as a checkpoint may have it
            continue
        moved = [parameter for parameter in group["params"] if id(parameter) in chosen]
        kept = [parameter for parameter in group["params"] if id(parameter) not in chosen]
        if moved and not kept:
            group["lr"] = rate
        elif moved:
            group["params"] = kept
            optimizer.add_param_group({**group, "params": moved, "lr": rate})
