"""Batches to score importance on, and the logits of a subnet."""

import torch
from torch import Tensor

from mlfs import Subnet, SuperTransformer
from tests.tiny_models import inputs, logits_of

METHODS = ("magnitude", "activation", "gradient")


def batches(suffix: str, count: int = 2) -> list[dict[str, Tensor]]:
    """Makes batches with labels of the task, padded on the right and on the left in turn."""
    out = []
    for seed in range(count):
        batch = inputs("left" if seed % 2 else "right", seed)
        ids, mask = batch["input_ids"], batch["attention_mask"]
        generator = torch.Generator().manual_seed(seed)
        if suffix == "ForSequenceClassification":
            labels = {"labels": torch.randint(2, (len(ids),), generator=generator)}
        elif suffix == "ForQuestionAnswering":
            first = mask.argmax(1)
            labels = {"start_positions": first, "end_positions": first + 2}
        elif suffix == "ForTokenClassification":
            labels = {"labels": torch.randint(2, ids.shape, generator=generator).masked_fill(mask == 0, -100)}
        else:
            labels = {"labels": ids.masked_fill(mask == 0, -100)}
        out.append(batch | labels)
    return out


def active(supernet: SuperTransformer, subnet: Subnet | None = None, side: str = "left") -> Tensor:
    """Returns the logits of a subnet, by default of the whole model."""
    with torch.no_grad(), supernet.activate(subnet or supernet.space.max):
        return logits_of(supernet(**inputs(side)))
