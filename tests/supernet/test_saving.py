"""The Hugging Face model's own ways to save, of an elastic one: a right checkpoint of the active size, or none."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers as tf
from huggingface_hub import HfApi

from mlfs import MLFSArguments, MLFSError, MLFSTrainer, SuperTransformer
from tests.helpers.runs import exportable, logits
from tests.supernets import distance, elastic, subnets_of
from tests.tiny_models import all_models, inputs, logits_of

every_model = pytest.mark.parametrize(("name", "suffix"), all_models())


def reloaded(supernet: SuperTransformer, folder: Path) -> torch.Tensor:
    """The logits of a checkpoint, read as any other; it must lack nothing and have nothing left over."""
    plain_class = getattr(tf, type(supernet.model).__name__)
    model, report = plain_class.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()) and type(model) is plain_class
    with torch.no_grad():
        return logits_of(model.eval()(**inputs("left")))


@every_model
def test_the_models_own_save_writes_what_runs(name, suffix, tmp_path):
    supernet = elastic(name, suffix)
    supernet.order("magnitude")
    supernet.model.save_pretrained(tmp_path / "whole")
    assert distance(reloaded(supernet, tmp_path / "whole"), logits(supernet)) < 1e-5
    small = exportable(name)[1]
    with supernet.activate(small):
        supernet.model.save_pretrained(tmp_path / "small", max_shard_size="20KB")
    assert len(list((tmp_path / "small").glob("*.safetensors"))) > 1, "arguments arrive"
    assert distance(reloaded(supernet, tmp_path / "small"), logits(supernet, small)) < 1e-5


def _of_the_trainer(supernet: SuperTransformer, folder: Path) -> Callable[[], object]:
    trainer = MLFSTrainer(supernet, MLFSArguments(str(folder.with_name("run")), report_to="none"))
    assert trainer.model is not None
    return lambda: trainer.accelerator.unwrap_model(trainer.model).save_pretrained(folder)


WAYS: dict[str, Callable[[SuperTransformer, Path], Callable[[], object]]] = {
    "the model's": lambda supernet, folder: lambda: supernet.model.save_pretrained(folder),
    "of a state": lambda supernet, folder: (
        lambda: supernet.model.save_pretrained(folder, state_dict=supernet.model.state_dict())
    ),
    "the trainer's model's": _of_the_trainer,
    "to the hub": lambda supernet, folder: lambda: supernet.push_to_hub("someone/something"),
    "the model's, to the hub": lambda supernet, folder: lambda: supernet.model.push_to_hub("someone/something"),
    "both": lambda supernet, folder: (
        lambda: supernet.model.save_pretrained(folder.with_name("here"), push_to_hub=True, repo_id="someone/something")
    ),
}


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Path:
    """A folder that stands for a repository of the Hub."""
    place = tmp_path / "saved"
    place.mkdir()

    def create(self: HfApi, repo_id: str, **_: object) -> SimpleNamespace:
        (place / "repository").touch()
        return SimpleNamespace(repo_id=repo_id)

    def upload(self: HfApi, repo_id: str, operations: list, **_: object) -> None:
        for operation in operations:
            with operation.as_file() as file:
                (place / operation.path_in_repo).write_bytes(file.read())

    monkeypatch.setattr(HfApi, "create_repo", create)
    monkeypatch.setattr(HfApi, "create_commit", upload)
    return place


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS.keys())
def test_every_way_to_save_writes_a_right_checkpoint_or_refuses(hub, way):
    supernet = elastic("llama-tied", "ForCausalLM")
    supernet.order("magnitude")
    small, odd = exportable("llama-tied")[1], subnets_of("llama-tied")["per layer, full depth"]
    save = way(supernet, hub)
    with (
        supernet.activate(odd),
        pytest.raises(MLFSError, match="cannot be saved as a transformers checkpoint") as raised,
    ):
        save()
    assert "\n" not in str(raised.value) and not list(hub.iterdir())
    with supernet.activate_rows([small, odd]), pytest.raises(MLFSError, match=r"save inside activate\(subnet\)"):
        save()
    assert not list(hub.iterdir())
    with supernet.activate(small):
        save()
    assert distance(reloaded(supernet, hub), logits(supernet, small)) < 1e-5


def test_another_models_state_is_not_saved_under_this_ones_name(tmp_path):
    supernet = elastic("bert", "ForSequenceClassification")
    state = {
        key: value + 1 if value.is_floating_point() else value for key, value in supernet.model.state_dict().items()
    }
    with pytest.raises(MLFSError, match=r"load it first \(load_state_dict\), then save without it"):
        supernet.model.save_pretrained(tmp_path, state_dict=state)
    assert not list(tmp_path.iterdir())
