"""Super-transformers of the small models in tests/tiny_models.py, with stages that matter, and how to compare them."""

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from mlfs import SearchSpace, Subnet, SuperTransformer
from mlfs.elastic.linear import ElasticLinear
from tests.tiny_models import CASES, make

HIDDEN, FFN, LAYERS = (48, 40, 32, 24, 16), (40, 24, 16), ((0, 1, 2, 3), (0, 2, 3), (1, 3))


def space_of(name: str, per_layer: bool = False) -> SearchSpace:
    """Makes the space that the small models are sliced in; the last choice of layers leaves out layer 0."""
    return SearchSpace(HIDDEN, CASES[name].heads, FFN, LAYERS, per_layer)


def perturb(supernet: SuperTransformer, std: float = 0.05, seed: int = 1) -> SuperTransformer:
    """Gives all stages an effect of modest size, as training would."""
    generator = torch.Generator().manual_seed(seed)
    for stage in range(supernet.stages):
        supernet.train_stage(stage)
    for module in supernet.model.modules():
        if isinstance(module, ElasticLinear):
            for b in module.lora_B:
                b.data.copy_(torch.randn(b.shape, generator=generator, dtype=b.dtype) * std)
    return supernet


def elastic(
    name: str, suffix: str, dtype: torch.dtype = torch.float32, per_layer: bool = True, std: float = 0.05
) -> SuperTransformer:
    """Makes the small model elastic: three stages of rank 4, each with an effect."""
    torch.manual_seed(1)
    model = make(name, suffix, dtype=dtype)
    return perturb(SuperTransformer(model, space_of(name, per_layer), rank=4, alpha=8.0), std).eval()


def subnets_of(name: str) -> dict[str, Subnet]:
    """Chooses the largest and the smallest subnet, one between that a configuration can state, and a few at random or
    with layers that differ."""
    space, mixed = space_of(name), space_of(name, per_layer=True)
    heads = CASES[name].heads
    generator = torch.Generator().manual_seed(len(name))
    return {
        "max": space.max,
        "min": space.min,
        "uniform": Subnet(8 * heads[1], heads[1], 24, (0, 2, 3)),
        "random": space.sample(generator),
        "per layer, full depth": Subnet(32, (heads[0], heads[2], heads[1], heads[0]), (16, 40, 24, 24), (0, 1, 2, 3)),
        "per layer, without layer 0": Subnet(40, (heads[2], heads[1]), (40, 16), (1, 3)),
        "per layer, random": mixed.sample(generator),
    }


def distance(actual: Tensor, expected: Tensor) -> float:
    """Computes the largest difference, relative to the largest number expected."""
    assert actual.shape == expected.shape
    assert torch.isfinite(expected).all()
    return ((actual - expected).abs().max() / expected.abs().max()).item()


def parameters_of(model: PreTrainedModel | nn.Module) -> int:
    """Counts the parameters of a model, each tied one once."""
    return sum(p.numel() for p in model.parameters())
