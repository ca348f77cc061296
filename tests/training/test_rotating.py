"""A run whose residual stream is rotated before stage 1: trained, saved, resumed; and what it refuses at once."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from mlfs import MLFSArguments, MLFSError, SuperTransformer
from mlfs.supernet.checkpoint import read_values
from mlfs.supernet.moments import collecting_moment, principal_axes
from mlfs.supernet.permutation import permutation_of
from tests.helpers.calibration import active
from tests.tiny_models import make
from tests.trainers import SPACE, assert_same, own, trainer

TIED = ("llama-tied", "ForCausalLM")
OPTIONS: dict[str, Any] = {"stage_steps": [3], "save_steps": 2, "order": "rotation"}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, SuperTransformer]:
    """A run of all stages, and the super-transformer it ended with."""
    folder = tmp_path_factory.mktemp("runs") / "finished"
    whole = trainer(folder, *TIED, **OPTIONS)
    whole.train()
    return folder, whole.supernet.eval()


def test_a_run_is_rotated_after_stage_0_and_loads_again(finished: tuple[Path, SuperTransformer]) -> None:
    folder, supernet = finished
    assert supernet.rotation is not None and {axis for axis, _ in supernet.permutation} == {"heads", "ffn"}
    assert SuperTransformer.from_pretrained(folder / "stage-0", make(*TIED)).rotation is None
    for place in (folder, folder / "stage-1", folder / "stage-1" / "checkpoint-2", folder / "stage-2"):
        assert read_values(place)["config"]["tie_word_embeddings"] is True  # the base's
        twin = SuperTransformer.from_pretrained(place, make(*TIED)).eval()
        assert torch.equal(twin.rotation, supernet.rotation) and twin.permutation == supernet.permutation
    twin = SuperTransformer.from_pretrained(folder, make(*TIED)).eval()
    for subnet in (SPACE.max, SPACE.min):
        assert torch.equal(active(twin, subnet), active(supernet, subnet))


def test_the_rotation_is_that_of_the_first_batches_after_stage_0(
    finished: tuple[Path, SuperTransformer], tmp_path: Path
) -> None:
    folder, supernet = finished
    t = trainer(tmp_path, *TIED, **OPTIONS)
    t.supernet.restore(folder / "stage-0")
    t.stage = 1
    torch.manual_seed(t.args.seed + 1)
    batches = [t._prepare_inputs(dict(batch)) for batch, _ in zip(t.get_train_dataloader(), range(3), strict=False)]
    with torch.no_grad(), collecting_moment(t.supernet) as moment:
        for batch in batches:
            t.supernet(**batch)
    expected = principal_axes(moment)
    cosines = (expected * supernet.rotation).sum(0).abs()
    torch.testing.assert_close(cosines, torch.ones_like(cosines), atol=1e-4, rtol=0)
    scores = t.supernet.importance("gradient", batches)
    assert supernet.permutation == permutation_of({key: score for key, score in scores.items() if key[0] != "hidden"})


@pytest.mark.parametrize("stage", [1, 2])
def test_a_run_that_was_cut_off_resumes_to_the_same(
    finished: tuple[Path, SuperTransformer], tmp_path: Path, stage: int
) -> None:
    run = Path(shutil.copytree(finished[0], tmp_path / "run"))
    for later in range(stage + 1, 3):
        shutil.rmtree(run / f"stage-{later}")
    (run / f"stage-{stage}" / "mlfs.json").unlink()
    shutil.rmtree(run / f"stage-{stage}" / "checkpoint-3")
    resumed = trainer(run, *TIED, **OPTIONS)
    resumed.train(resume_from_checkpoint=True)
    assert torch.equal(resumed.supernet.rotation, finished[1].rotation)
    assert_same(own(resumed.supernet), own(finished[1]))
    assert torch.equal(active(resumed.supernet.eval()), active(finished[1]))


def test_batches_without_labels_rank_by_activation(tmp_path: Path) -> None:
    def loss(outputs: Any, labels: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        return outputs.logits.pow(2).mean()

    t = trainer(tmp_path, "llama", "ForCausalLM", **OPTIONS | {"stages_to_train": [1]})
    t.train_dataset = t.train_dataset.remove_columns("labels")
    t.compute_loss_func = loss
    t.stage = 1
    t._order()
    assert t.supernet.rotation is not None and t.supernet.permutation


def test_what_cannot_be_rotated_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(MLFSError, match="cannot be rotated: its LayerNorms"):
        trainer(tmp_path / "run", order="rotation")
    for what in ("norms", "embeddings"):
        with pytest.raises(MLFSError, match="take one of both"):
            MLFSArguments(str(tmp_path), order="rotation", **{f"train_{what}": True})
        trained = SuperTransformer(make(*TIED), SPACE, rank=2)
        trained.train_stage(0, **{what: True})
        with pytest.raises(MLFSError, match="or has trained"):
            trainer(tmp_path / "run", supernet=trained, order="rotation")
    assert not (tmp_path / "run").exists() or not any((tmp_path / "run").iterdir())


def test_a_super_transformer_that_is_rotated_trains_as_it_is(tmp_path: Path) -> None:
    supernet = SuperTransformer(make(*TIED), SPACE, rank=2)
    supernet.apply_rotation(torch.eye(48))
    t = trainer(tmp_path, *TIED, supernet=supernet, **OPTIONS | {"stages_to_train": [1], "stage_steps": [1]})
    t.train()
    assert torch.equal(supernet.rotation, torch.eye(48)) and supernet.permutation == {}


def test_the_same_trainer_resumes_what_it_has_finished(tmp_path: Path) -> None:
    t = trainer(tmp_path, *TIED, **OPTIONS)
    t.train()
    before = own(t.supernet)
    t.train(resume_from_checkpoint=True)
    assert_same(own(t.supernet), before)
