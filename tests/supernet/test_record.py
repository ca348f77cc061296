"""The record of a super-transformer is read wherever somebody asks, however it came to be what it is."""

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from mlfs import ElasticLinear, MLFSError, SuperTransformer
from mlfs.supernet.recorded import UNRECORDED
from tests.helpers.runs import logits
from tests.supernet.test_state import assert_equal, fresh, trained
from tests.tiny_models import inputs, make

BERT = ("bert", "ForSequenceClassification")


# ---- how it is written ------------------------------------------------------------------------------------------


def _copied(own: torch.Tensor, value: torch.Tensor) -> None:
    own.data.copy_(value)


def _replaced(own: torch.Tensor, value: torch.Tensor) -> None:
    own.data = value.data.clone()


def _in_inference_mode(own: torch.Tensor, value: torch.Tensor) -> None:
    with torch.inference_mode():
        own.copy_(value)


def _without_gradients(own: torch.Tensor, value: torch.Tensor) -> None:
    with torch.no_grad():
        own.copy_(value)


WRITERS = (_copied, _replaced, _in_inference_mode, _without_gradients)


def carry(source: SuperTransformer, target: SuperTransformer, write: Callable[..., None] = _copied) -> None:
    """Writes the state of one super-transformer over the tensors of another, which is not told."""
    state = source.state_dict()
    for key, own in target.state_dict(keep_vars=True).items():
        write(own, state[key])


@pytest.mark.parametrize("write", WRITERS)
def test_a_forward_pass_and_a_saved_run_see_every_way_to_write(write, tmp_path):
    supernet, twin = trained(*BERT), fresh(*BERT)
    logits(twin)
    carry(supernet, twin, write)
    assert torch.equal(logits(twin), logits(supernet))
    assert_equal(twin, supernet, "bert", tmp_path / "run")


@pytest.mark.parametrize("write", WRITERS)
def test_order_and_what_belongs_to_the_run_are_read_where_only_they_changed(write):
    supernet, twin = trained(*BERT), trained(*BERT)
    twin.load_state_dict(supernet.state_dict())
    expected = supernet.permutation
    twin.apply_permutation({("hidden", None): list(range(48))[::-1]})
    assert twin.permutation != expected
    carry(supernet, twin, write)
    assert twin.permutation == expected


# ---- who reads it -----------------------------------------------------------------------------------------------


def _batches() -> list[dict[str, torch.Tensor]]:
    return [inputs() | {"labels": torch.tensor([0, 1, 0])}]


def _refused(call: Callable[[], None]) -> None:
    """Calls what no BERT does, and what others do is told in test_rotation.py."""
    with pytest.raises(MLFSError, match="cannot be rotated"):
        call()


@pytest.fixture(scope="module")
def supernet() -> SuperTransformer:
    return trained(*BERT)


ENTRIES: dict[str, Callable[[Any, Path], Any]] = {
    "added_rows": lambda s, _: s.added_rows(),
    "apply_permutation": lambda s, _: s.apply_permutation({("hidden", None): list(range(48))[::-1]}),
    "apply_rotation": lambda s, _: _refused(lambda: s.apply_rotation(torch.eye(48))),
    "base_parameters": lambda s, _: s.base_parameters(),
    "base_vocabulary": lambda s, _: s.base_vocabulary,
    "count_parameters": lambda s, _: s.count_parameters(s.space.min),
    "count_trainable": lambda s, _: s.count_trainable(s.space.min),
    "elastic": lambda s, _: list(s.elastic()),
    "extract": lambda s, _: s.extract(s.space.max),
    "fingerprint": lambda s, _: s.fingerprint(),
    "head_parameters": lambda s, _: s.head_parameters(),
    "importance": lambda s, _: s.importance("gradient", _batches()),
    "merge_stages": lambda s, _: s.merge_stages(3),
    "new_parameters": lambda s, _: s.new_parameters,
    "order": lambda s, _: s.order("gradient", _batches()),
    "own_parameters": lambda s, _: s.own_parameters(),
    "owned_modules": lambda s, _: list(s.owned_modules()),
    "permutation": lambda s, _: s.permutation,
    "rank_layers": lambda s, _: s.rank_layers("influence", _batches()),
    "restore": lambda s, folder: s.restore(folder / "run"),
    "rotation": lambda s, _: s.rotation,
    "save_pretrained": lambda s, folder: s.save_pretrained(folder / "twin"),
    "train_stage": lambda s, _: s.train_stage(2),
    "trained_stages": lambda s, _: s.trained_stages,
}
# What is the Hugging Face model's, or a view of it.
OTHERS: dict[str, Callable[[Any, Path], Any]] = {
    "a call": lambda s, _: s(**inputs()),
    "state_dict": lambda s, _: s.state_dict(),
    "model.state_dict": lambda s, _: s.model.state_dict(),
    "model.save_pretrained": lambda s, folder: s.model.save_pretrained(folder / "plain"),
    "bound.extract": lambda s, _: s.bound(s.space.max).extract(),
    "bound.save_pretrained": lambda s, folder: s.bound(s.space.max).save_pretrained(folder / "plain"),
    "a pickle": lambda s, _: pickle.loads(pickle.dumps(s)),
}


def test_every_public_method_and_property_is_gone_over():
    base = set(dir(nn.Module)) | {"qconfig"}
    public = {name for name in dir(SuperTransformer) if not name.startswith("_")} - base
    assert public - UNRECORDED - {"from_pretrained"} == ENTRIES.keys()


@pytest.mark.parametrize("name", [*ENTRIES, *OTHERS])
def test_every_entry_reads_first_what_was_loaded(supernet, name, tmp_path):
    twin = fresh(*BERT)
    supernet.save_pretrained(tmp_path / "run")
    carry(supernet, twin)
    found = (ENTRIES | OTHERS)[name](twin, tmp_path)
    if name == "a pickle":
        twin = found
        assert twin.trained_stages == 3
    layers = [module for module in twin.modules() if isinstance(module, ElasticLinear) and module.stages]
    assert {layer.trained_stages for layer in layers} == {3}
    if name in ("order", "apply_permutation", "merge_stages"):  # which change the numbers by rounding, and the order
        torch.testing.assert_close(logits(twin), logits(supernet))
        assert twin.permutation != {}
    else:
        assert_equal(twin, supernet, "bert", tmp_path / "again")


def test_what_is_extracted_merged_or_bound_right_after_a_load_computes_what_was_loaded(supernet):
    expected = logits(supernet)
    for make_of in (lambda s: s.extract(s.space.max), lambda s: s.bound(s.space.max).extract()):
        twin = fresh(*BERT)
        carry(supernet, twin)
        with torch.no_grad():
            torch.testing.assert_close(make_of(twin).eval()(**inputs("left")).logits, expected)
    twin = fresh(*BERT)
    carry(supernet, twin)
    twin.merge_stages(3)
    torch.testing.assert_close(logits(twin), expected)


@pytest.mark.parametrize(
    ("name", "suffix", "part"),
    [
        ("bert", "ForSequenceClassification", "bert"),
        ("gpt2", "LMHeadModel", "transformer"),
        ("llama", "ForCausalLM", "model"),
        ("gpt_neox", "ForCausalLM", "gpt_neox"),
        ("distilbert", "ForMaskedLM", "distilbert"),
    ],
)
@pytest.mark.parametrize("copied", [lambda s: s, copy.deepcopy, lambda s: pickle.loads(pickle.dumps(s))])
def test_a_part_that_is_called_on_its_own_has_what_was_loaded(name, suffix, part, copied):
    supernet, twin = trained(name, suffix), copied(fresh(name, suffix))
    body = twin.model.get_submodule(part)  # kept from before
    carry(supernet, twin)
    with torch.no_grad():
        found = body(**inputs("left")).last_hidden_state
        assert torch.equal(found, supernet.model.get_submodule(part)(**inputs("left")).last_hidden_state)


# ---- parameters alone, and states of parts ----------------------------------------------------------------------


@pytest.mark.parametrize("how", ["vector", "data"])
def test_stages_with_an_effect_count_where_only_parameters_were_carried(how, tmp_path):
    supernet, twin = fresh(*BERT), fresh(*BERT)  # in the base's own order: parameters do not say another
    for stage in range(2):
        supernet.train_stage(stage)
        for module in supernet.elastic():
            if isinstance(module, ElasticLinear) and module.stages:
                nn.init.normal_(module.lora_B[stage], std=0.05)
    if how == "vector":
        nn.utils.vector_to_parameters(nn.utils.parameters_to_vector(supernet.parameters()), twin.parameters())
    else:
        for own, value in zip(twin.parameters(), supernet.parameters(), strict=True):
            own.data.copy_(value)
    twin.save_pretrained(tmp_path / "twin")
    assert twin.trained_stages == 2
    assert_equal(twin, supernet, "bert", tmp_path / "run")


PARTS = ("bert", "bert.encoder", "bert.encoder.layer", "bert.encoder.layer.1", "bert.embeddings", "bert.pooler")


@pytest.mark.parametrize("part", [*PARTS, "bert.encoder.layer.2.attention.self.query", "bert.embeddings.LayerNorm"])
@pytest.mark.parametrize("copied", [lambda s: s, copy.deepcopy])
def test_the_state_of_a_part_is_refused_before_anything_is_loaded(part, copied):
    twin = copied(fresh(*BERT))
    for source in (trained(*BERT), make(*BERT, seed=3)):
        model = source.model if isinstance(source, SuperTransformer) else source
        before = {key: value.clone() for key, value in twin.state_dict().items()}
        for strict in (True, False):
            with pytest.raises(MLFSError, match=r"load the whole model's \(supernet\.load_state_dict\)") as raised:
                twin.model.get_submodule(part).load_state_dict(model.get_submodule(part).state_dict(), strict=strict)
            assert "\n" not in str(raised.value)
        assert all(torch.equal(before[key], value) for key, value in twin.state_dict().items())
    whole = trained(*BERT)
    twin.load_state_dict(whole.state_dict())
    assert_equal(twin, whole, "bert")
    with pytest.raises(MLFSError):  # a whole load before it changes nothing
        twin.model.get_submodule(part).load_state_dict(whole.model.get_submodule(part).state_dict())


def test_a_head_alone_and_parts_of_what_was_extracted_are_loaded():
    supernet, twin = trained(*BERT), fresh(*BERT)
    twin.model.classifier.load_state_dict(supernet.model.classifier.state_dict())
    assert torch.equal(twin.model.classifier.own_weight, supernet.model.classifier.own_weight)
    small, other = supernet.extract(supernet.space.min), twin.extract(twin.space.min)
    other.bert.load_state_dict(small.bert.state_dict())
    with torch.no_grad():
        assert torch.equal(other(**inputs()).logits, small(**inputs()).logits)


# ---- several processes ------------------------------------------------------------------------------------------


class Outer(nn.Module):
    """A module of one's own around a super-transformer, as Lightning's."""

    def __init__(self, net: SuperTransformer) -> None:
        super().__init__()
        self.net = net

    def forward(self, **batch: Any) -> Any:
        return self.net(**batch)


def _wrap_on_each_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(folder + "/store", 2), rank=rank, world_size=2)
    found = []
    for outer in (lambda s: s, Outer):
        for options in ({}, {"broadcast_buffers": False}):
            supernet = fresh(*BERT)
            if rank == 0:
                supernet.load_state_dict(torch.load(folder + "/state.pt", weights_only=True))
            wrapped = DistributedDataParallel(outer(supernet), find_unused_parameters=True, **options)
            version = supernet.record.trained_stages._version
            loss = wrapped(**_batches()[0]).loss
            loss.backward()
            assert supernet.record.trained_stages._version == version, "it is not sent with every forward pass"
            found.append((supernet.trained_stages, supernet.permutation, logits(supernet), loss.item()))
    torch.save(found, f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()


def test_all_processes_of_ddp_have_the_record_of_the_first(tmp_path):
    supernet = trained(*BERT)
    torch.save(supernet.state_dict(), tmp_path / "state.pt")
    torch.multiprocessing.spawn(_wrap_on_each_rank, args=(str(tmp_path),), nprocs=2)
    for rank in range(2):
        found = torch.load(tmp_path / f"rank{rank}.pt", weights_only=True)
        assert len(found) == 4
        for stages, permutation, numbers, loss in found:
            assert stages == 3 and permutation == supernet.permutation
            assert torch.equal(numbers, logits(supernet)) and loss > 0
