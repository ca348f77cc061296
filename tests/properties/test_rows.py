"""A batch whose rows run at different sizes: each row comes out as if it ran alone."""

import pytest
import torch
from torch import Tensor

from mlfs import MLFSError, SuperTransformer
from mlfs.ops.backend import use_backend
from tests.supernets import distance, elastic, subnets_of
from tests.tiny_models import all_models, inputs, logits_of

MODELS = all_models()
every_model = pytest.mark.parametrize(("name", "suffix"), MODELS)
every_decoder = pytest.mark.parametrize(
    ("name", "suffix"), [model for model in MODELS if model[1] in ("ForCausalLM", "LMHeadModel")]
)


def batch_of(rows: int, side: str = "right") -> dict[str, Tensor]:
    """A batch of that many rows, padded to different lengths."""
    parts = [inputs(side, seed) for seed in range(rows)]
    return {key: torch.cat([part[key] for part in parts])[:rows] for key in parts[0]}


def row(batch: dict[str, Tensor], i: int) -> dict[str, Tensor]:
    return {key: value[i : i + 1] for key, value in batch.items()}


@every_model
def test_each_row_equals_the_row_alone(name, suffix):
    supernet = elastic(name, suffix, torch.float64)
    subnets = [*subnets_of(name).values()]
    subnets.insert(1, subnets[0])  # two neighbours of one size, and the first size again at the end
    subnets.append(subnets[0])
    for side in ("left", "right"):
        batch = batch_of(len(subnets), side)
        with torch.no_grad():
            with supernet.activate_rows(subnets):
                together = logits_of(supernet(**batch))
            for i, subnet in enumerate(subnets):
                with supernet.activate(subnet):
                    alone = logits_of(supernet(**row(batch, i)))
                kept = batch["attention_mask"][i].bool() if together.shape[1] == batch["input_ids"].shape[1] else ...
                assert distance(together[i][kept], alone[0][kept]) < 1e-11, (i, subnet)


@every_decoder
def test_generation_gives_each_row_the_tokens_it_gets_alone(name, suffix):
    supernet = elastic(name, suffix, torch.float64)
    subnets = list(subnets_of(name).values())
    batch = batch_of(len(subnets), "left")
    options = {"max_new_tokens": 7, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    with supernet.activate_rows(subnets):
        together = supernet.generate(**batch, **options)
    for i, subnet in enumerate(subnets):
        with supernet.activate(subnet):
            assert torch.equal(together[i : i + 1], supernet.generate(**row(batch, i), **options)), subnet


@pytest.mark.parametrize("name, suffix", [("bert", "ForSequenceClassification"), ("qwen3", "ForCausalLM")])
def test_gradients_are_the_sum_of_those_of_each_row(name, suffix):
    supernet = elastic(name, suffix, torch.float64)
    supernet.train_stage(2)
    subnets = list(subnets_of(name).values())
    batch = batch_of(len(subnets))

    def gradients() -> dict[str, Tensor]:
        found = {n: p.grad.clone() for n, p in supernet.own_parameters().items() if p.grad is not None}
        supernet.model.zero_grad()
        return found

    with supernet.activate_rows(subnets):
        logits_of(supernet(**batch)).square().mean((-1, -2) if suffix == "ForCausalLM" else -1).sum().backward()
    together = gradients()
    for i, subnet in enumerate(subnets):
        with supernet.activate(subnet):
            logits_of(supernet(**row(batch, i))).square().mean().backward()
    alone = gradients()
    assert together.keys() == alone.keys() and any("lora_A.2" in key for key in alone)
    for key in alone:
        assert (together[key] - alone[key]).abs().max() <= 1e-9 * alone[key].abs().max() + 1e-15, key


@pytest.mark.parametrize("name, suffix", [("bert", "ForSequenceClassification"), ("llama", "ForCausalLM")])
def test_kernels_give_what_the_reference_gives(name, suffix):
    pytest.importorskip("triton")
    supernet = elastic(name, suffix)
    subnets = list(subnets_of(name).values())[:3]
    batch = batch_of(len(subnets))
    with torch.no_grad(), supernet.activate_rows(subnets):
        expected = logits_of(supernet(**batch))
        with use_backend("triton"):
            assert distance(logits_of(supernet(**batch)), expected) < 1e-5


def test_nested_blocks_restore_the_outer_one():
    supernet = elastic("bert", "ForSequenceClassification")
    subnets = list(subnets_of("bert").values())[:2]
    batch = batch_of(2)
    with torch.no_grad(), supernet.activate_rows(subnets):
        first = supernet(**batch).logits
        with supernet.activate(subnets[1]):
            small = supernet(**batch).logits
        with pytest.raises(ZeroDivisionError), supernet.activate_rows(subnets[::-1]):
            1 / 0  # noqa: B018
        assert torch.equal(supernet(**batch).logits, first)
    assert distance(small[1:], first[1:]) < 1e-5


@pytest.mark.parametrize("rows", [1, 3])
def test_another_number_of_rows_is_refused(rows):
    supernet: SuperTransformer = elastic("bert", "ForSequenceClassification")
    message = f"was given 2 subnets, but {rows} rows run: give one for each row"
    subnets = [supernet.space.max, supernet.space.min]
    with supernet.activate_rows(subnets), pytest.raises(MLFSError, match=message):
        supernet(**batch_of(rows))
