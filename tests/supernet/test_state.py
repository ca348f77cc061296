"""A super-transformer carried by its state, or as an object: what trained and the order of the units go with it."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
import torch.multiprocessing
from accelerate import Accelerator
from safetensors.torch import load_model, save_model
from torch import nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict

from mlfs import SuperTransformer
from mlfs.supernet.permutation import difference
from tests.helpers.runs import logits
from tests.supernets import elastic, space_of, subnets_of
from tests.tiny_models import CASES, all_models, make

every_model = pytest.mark.parametrize(("name", "suffix"), all_models())
every_family = pytest.mark.parametrize(("name", "suffix"), [(name, case.classes[0]) for name, case in CASES.items()])


def trained(name: str, suffix: str) -> SuperTransformer:
    """A small model as training leaves it: three stages with an effect, ordered, norms and head changed."""
    supernet = elastic(name, suffix)
    supernet.order("magnitude")
    supernet.train_stage(2, norms=True)
    with torch.no_grad():
        for parameter in supernet.own_parameters().values():
            parameter += 0.01 * torch.randn_like(parameter)
    return supernet


def fresh(name: str, suffix: str) -> SuperTransformer:
    """The same base, of which nothing has trained and whose units are in their first order."""
    torch.manual_seed(2)
    return SuperTransformer(make(name, suffix), space_of(name, per_layer=True), rank=4, alpha=8.0).eval()


def assert_equal(twin: Any, supernet: SuperTransformer, name: str, folder: Path | None = None) -> None:
    """Compares two super-transformers at every size, and what becomes of the second once it is saved."""
    for subnet in subnets_of(name).values():
        assert torch.equal(logits(twin, subnet), logits(supernet, subnet))
    moves = difference(twin.permutation, supernet.permutation)
    assert all(order == sorted(order) for order in moves.values()) and twin.trained_stages == supernet.trained_stages
    if folder is not None:
        twin.save_pretrained(folder)
        base = make(name, type(supernet.model).__name__.removeprefix(CASES[name].name))
        again = SuperTransformer.from_pretrained(folder, model=base).eval()
        assert torch.equal(logits(again), logits(supernet))


# ---- by its state -----------------------------------------------------------------------------------------------


def _state(source: nn.Module, target: nn.Module, folder: Path) -> None:
    result = target.load_state_dict(source.state_dict())
    assert not result.missing_keys and not result.unexpected_keys


def _assigned(source: nn.Module, target: nn.Module, folder: Path) -> None:
    state = {key: value.clone() for key, value in source.state_dict().items()}
    target.load_state_dict(state, assign=True)


def _torch_save(source: nn.Module, target: nn.Module, folder: Path) -> None:
    torch.save({"state_dict": source.state_dict()}, folder / "model.ckpt")
    target.load_state_dict(torch.load(folder / "model.ckpt", weights_only=True)["state_dict"])


def _safetensors(source: nn.Module, target: nn.Module, folder: Path) -> None:
    save_model(source, str(folder / "model.safetensors"))
    load_model(target, folder / "model.safetensors")


def _inner_model(source: Any, target: Any, folder: Path) -> None:
    target.model.load_state_dict(source.model.state_dict())


def _outer_module(source: nn.Module, target: nn.Module, folder: Path) -> None:
    """As Lightning does: the model is an attribute of a module, whose state has the names of both."""
    outer, other = nn.Module(), nn.Module()
    outer.net, other.net = source, target
    torch.save({"state_dict": outer.state_dict()}, folder / "last.ckpt")
    other.load_state_dict(torch.load(folder / "last.ckpt", weights_only=True)["state_dict"])


def _accelerate(source: nn.Module, target: nn.Module, folder: Path) -> None:
    writes = Accelerator(cpu=True)
    writes.prepare(source)
    writes.save_state(folder / "state")
    reads = Accelerator(cpu=True)
    reads.prepare(target)
    reads.load_state(folder / "state")


def _distributed_checkpoint(source: nn.Module, target: nn.Module, folder: Path) -> None:
    dcp.save({"model": get_model_state_dict(source)}, checkpoint_id=folder / "dcp", no_dist=True)
    state = {"model": get_model_state_dict(target)}
    dcp.load(state, checkpoint_id=folder / "dcp", no_dist=True)
    set_model_state_dict(target, state["model"])


def _in_place(source: nn.Module, target: nn.Module, folder: Path) -> None:
    """Without load_state_dict: what a state dict holds are the model's own tensors."""
    with torch.no_grad():
        own = target.state_dict()
        for key, value in source.state_dict().items():
            own[key].copy_(value)


CARRIERS = {
    function.__name__.strip("_"): function
    for function in (
        _state,
        _assigned,
        _torch_save,
        _safetensors,
        _inner_model,
        _outer_module,
        _accelerate,
        _distributed_checkpoint,
        _in_place,
    )
}


@every_model
def test_a_state_carries_what_trained_and_the_order(name, suffix, tmp_path):
    supernet, twin = trained(name, suffix), fresh(name, suffix)
    assert not torch.equal(logits(twin), logits(supernet))
    _state(supernet, twin, tmp_path)
    assert_equal(twin, supernet, name, tmp_path / "run")


@pytest.mark.parametrize("carry", CARRIERS.values(), ids=CARRIERS.keys())
@pytest.mark.parametrize(("name", "suffix"), [("bert", "ForSequenceClassification"), ("llama-tied", "ForCausalLM")])
def test_whoever_carries_the_state_carries_all_of_it(name, suffix, carry, tmp_path):
    supernet, twin = trained(name, suffix), fresh(name, suffix)
    carry(supernet, twin, tmp_path)
    assert_equal(twin, supernet, name, tmp_path / "run")
