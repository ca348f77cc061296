"""The contract with transformers' generate: every size makes the tokens of the model that is extracted at that size."""

import pytest
import torch
from transformers import DynamicCache, StaticCache

from mlfs import MLFSError
from tests.contracts import page
from tests.contracts.generate_rows import CHANGED, PLAIN, REFUSED, ROWS, SAME, ids, text
from tests.models.fused.models import language_model
from tests.supernets import subnets_of
from tests.tiny_models import CASES

DECODERS = [name for name, case in CASES.items() if case.is_decoder]
SIZES = ("max", "uniform", "per layer, without layer 0")


@pytest.fixture(scope="module", params=DECODERS)
def models(request):
    """A super-transformer, its sizes, the extracted models of these, and a small one that assists."""
    supernet = language_model(request.param)
    subnets = {size: subnets_of(request.param)[size] for size in SIZES}
    extracted = {size: supernet.extract(subnet).eval() for size, subnet in subnets.items()}
    assistant = supernet.extract(subnets_of(request.param)["min"]).eval()
    return supernet, subnets, extracted, assistant


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.asked)
@torch.no_grad()
def test_every_size_makes_the_tokens_of_its_extracted_model(row, models):
    supernet, subnets, extracted, assistant = models
    for size, subnet in subnets.items():
        if row.does == PLAIN:
            with pytest.raises((AssertionError, ImportError, ValueError)) as expected:
                row.run(extracted[size], assistant)
            with pytest.raises(type(expected.value)) as found, supernet.activate(subnet):
                row.run(supernet.model, assistant)
            assert str(found.value) == str(expected.value)
            continue
        with supernet.activate(subnet):
            made = row.run(supernet.model, assistant)
        # transformers allocates that cache as the configuration says, which has one size for all layers
        alike = ROWS[0] if row.asked == "prefill_chunk_size, static" and not subnet.is_uniform else row
        assert row.does == SAME and torch.equal(made, alike.run(extracted[size], assistant)), size


@pytest.mark.parametrize("kind", [DynamicCache, StaticCache])
@torch.no_grad()
def test_a_cache_of_another_size_is_refused_with_the_way_out(kind, models):
    supernet, subnets, *_ = models
    assert CHANGED.does == REFUSED
    for first, then in (("max", "per layer, without layer 0"), ("per layer, without layer 0", "max")):
        options = {"max_cache_len": 30} if kind is StaticCache else {}
        cache = kind(config=supernet.config, **options)
        with supernet.activate(subnets[first]):
            supernet(ids()[:, :6], past_key_values=cache)
        message = r"^the cache holds keys of another size \(layer .*: go on with"
        with supernet.activate(subnets[then]), pytest.raises(MLFSError, match=message):
            supernet(ids()[:, 6:7], past_key_values=cache)


@torch.no_grad()
def test_an_emptied_cache_takes_another_size(models):
    supernet, subnets, extracted, _ = models
    cache = StaticCache(config=supernet.config, max_cache_len=20)
    with supernet.activate(subnets["max"]):
        supernet(ids(), past_key_values=cache)
    cache.reset()
    with supernet.activate(subnets["uniform"]):
        found = supernet(ids(), past_key_values=cache).logits
    torch.testing.assert_close(found, extracted["uniform"](ids()).logits, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_logits_of_a_cache_longer_than_what_is_written(models):
    """Number by number, not only the tokens: the keys that are not written must not count."""
    supernet, subnets, extracted, _ = models
    for size, subnet in subnets.items():
        logits = []
        for model in (supernet.model, extracted[size]):
            cache = StaticCache(config=model.config, max_cache_len=25)
            with supernet.activate(subnet):
                parts = [model(x, past_key_values=cache, attention_mask=mask).logits for x, mask in steps()]
            logits.append(torch.cat(parts, 1))
        torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-5)


def steps() -> list[tuple[torch.Tensor, torch.Tensor | None]]:
    """Five tokens without a mask, three more, and one more."""
    x = ids()
    masks = [None, torch.ones(3, 8, dtype=torch.long), torch.ones(3, 9, dtype=torch.long)]
    return list(zip((x[:, :5], x[:, 5:8], x[:, 8:9]), masks, strict=True))


def test_the_page_says_what_is_tested():
    page.check("generate", text())
