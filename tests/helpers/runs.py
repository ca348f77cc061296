"""Saved super-transformers: their files, their logits, and the subnets that can be exported."""

from pathlib import Path

import torch
from safetensors.torch import load_file

from mlfs import Subnet, SuperTransformer
from tests.supernets import LAYERS
from tests.tiny_models import CASES, inputs, logits_of, make


def logits(supernet: SuperTransformer, subnet: Subnet | None = None) -> torch.Tensor:
    """Returns the logits of a subnet, by default of the whole model."""
    with torch.no_grad(), supernet.activate(subnet or supernet.space.max):
        return logits_of(supernet(**inputs("left")))


def tensors_file(folder: Path) -> Path:
    """Finds the one safetensors file of a folder."""
    (path,) = folder.glob("*.safetensors")
    return path


def stored(folder: Path) -> dict[str, torch.Tensor]:
    """Reads the tensors of a saved run, without the orders of axes that are in their first order."""
    tensors = load_file(tensors_file(folder))
    first = {key for key, order in tensors.items() if key.startswith("permutation.") and order.diff().eq(1).all()}
    return {key: value for key, value in tensors.items() if key not in first}


def same_tensors(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    """Whether two dicts hold the same tensors."""
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def load(path: Path) -> SuperTransformer:
    """Loads a run of the small BERT on a base made anew."""
    return SuperTransformer.from_pretrained(path, model=make("bert", "ForSequenceClassification")).eval()


def exportable(name: str) -> list[Subnet]:
    """Lists subnets of every depth that a configuration can state; of some families also such whose hidden size is not
    heads times head size."""
    heads = CASES[name].heads
    chosen = [Subnet(8 * h, h, f, kept) for h, f, kept in zip(heads, (40, 16, 24), LAYERS, strict=True)]
    if name.startswith(("llama", "mistral", "qwen")):
        chosen += [Subnet(48, heads[2], 24, LAYERS[2]), Subnet(40, heads[1], 40, LAYERS[1])]
    # Llama's configuration refuses hidden sizes that are no multiple of the heads.
    return [s for s in chosen if not (name.startswith("llama") and s.hidden % s.per_layer("heads")[0])]
