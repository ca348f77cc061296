"""Mixed precision: every family trains in it, and computes in it what the plain model does."""

from pathlib import Path

import pytest
import torch

from mlfs import SearchSpace, SuperTransformer
from tests.supernets import distance, elastic
from tests.tiny_models import CASES, inputs, logits_of, make
from tests.trainers import trainer

HEADS = [
    (name, suffix)
    for name, case in CASES.items()
    for suffix in case.classes
    if suffix.endswith(("SequenceClassification", "LM", "LMHeadModel"))
]


@pytest.mark.parametrize(("name", "suffix"), dict(HEADS).items())
def test_every_family_trains_in_bf16(name: str, suffix: str, tmp_path: Path) -> None:
    space = SearchSpace((48, 32, 24), CASES[name].heads, (40, 20), ((0, 1, 2, 3), (1, 3)))
    supernet = SuperTransformer(make(name, suffix), space, rank=2)
    t = trainer(tmp_path, name, suffix, supernet=supernet, bf16=True, save_strategy="no", stage_steps=[1])
    dtypes = set()
    supernet.layers[-1].register_forward_hook(lambda *_: dtypes.add(torch.is_autocast_enabled("cpu")))
    t.train()
    assert dtypes >= {True}
    assert all(torch.isfinite(p).all() and p.dtype == torch.float32 for p in supernet.own_parameters().values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize(("name", "suffix"), HEADS)
def test_under_autocast_a_size_computes_what_its_extracted_model_does(name, suffix, padded, dtype) -> None:
    """Forward and backward, from a cache too; to rounding in that type, whatever the backend."""
    supernet = elastic(name, suffix)
    batch = inputs("left" if CASES[name].is_decoder else "right")
    if not padded:
        del batch["attention_mask"]
    subnet = supernet.space.min
    plain = supernet.extract(subnet).eval()
    supernet.train_stage(2)
    with torch.autocast("cpu", dtype), supernet.activate(subnet):
        found = logits_of(supernet(**batch))
        expected = logits_of(plain(**batch))
        found.float().square().sum().backward()
    assert distance(found.detach().float(), expected.detach().float()) < (0.05 if dtype == torch.bfloat16 else 0.01)
    assert all(torch.isfinite(p.grad).all() for p in supernet.own_parameters().values() if p.grad is not None)
