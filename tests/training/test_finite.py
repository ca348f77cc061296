"""What is not finite ends a run before it is trained on, or saved."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from mlfs import MLFSError
from mlfs.training.trainer import MLFSTrainer
from tests.trainers import own, trainer


class Spoiled(TrainerCallback):
    """Puts NaN into all gradients just before the update of a step: later than the trainer looks at them."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        if state.global_step == self.step:
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter.grad.fill_(float("nan"))


def test_a_gradient_that_is_not_finite_changes_nothing_and_is_named(tmp_path: Path) -> None:
    t = trainer(tmp_path, stages_to_train=[0], save_steps=1)
    own_parameters = t.supernet.own_parameters()
    parameter = next(p for name, p in own_parameters.items() if p.requires_grad and "lora_B" in name)
    parameter.register_hook(lambda grad: grad * float("inf") if t.state.global_step == 4 else grad)
    kept: dict[str, torch.Tensor] = {}

    class Note(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            kept.update(own(t.supernet))

    t.add_callback(Note())
    with pytest.raises(MLFSError, match=r"^a gradient became NaN or infinite at stage 0, step 5, .*checkpoint-4\. "):
        t.train()
    assert all(torch.equal(value, kept[key]) for key, value in own(t.supernet).items())


def test_weights_that_are_not_finite_are_not_saved_as_a_checkpoint(tmp_path: Path) -> None:
    t = trainer(tmp_path, stages_to_train=[0], save_steps=1, save_total_limit=1, callbacks=[Spoiled(3)])
    with pytest.raises(MLFSError, match=r"^the weight \S+ became NaN or infinite at stage 0, step 4, .*checkpoint-3\."):
        t.train()
    assert [folder.name for folder in (tmp_path / "stage-0").glob("checkpoint-*")] == ["checkpoint-3"]
    (tensors,) = (tmp_path / "stage-0" / "checkpoint-3").glob("stages-*.safetensors")
    assert all(value.isfinite().all() for value in load_file(tensors).values())
    again = trainer(tmp_path, stages_to_train=[0], save_steps=1)
    again.train(resume_from_checkpoint=True)
    alone = trainer(tmp_path / "alone", stages_to_train=[0], save_steps=1)
    alone.train()
    assert all(torch.equal(value, own(alone.supernet)[key]) for key, value in own(again.supernet).items())


def test_a_stage_that_ends_in_weights_that_are_not_finite_is_not_saved(tmp_path: Path) -> None:
    t = trainer(tmp_path, stages_to_train=[0], save_strategy="no", callbacks=[Spoiled(7)])
    with pytest.raises(MLFSError, match=r"the weight .* became NaN or infinite at stage 0, step 8"):
        t.train()
    assert not (tmp_path / "mlfs.json").exists() and not (tmp_path / "stage-0" / "mlfs.json").exists()


def test_where_the_loss_is_scaled_the_scaler_passes_over_updates(tmp_path: Path) -> None:
    t = trainer(tmp_path, stages_to_train=[0])
    t.accelerator.scaler = object()  # as for fp16 on GPUs
    t.stage = 0
    t.create_optimizer_and_scheduler(num_training_steps=1)
    for parameter in t._optimized_parameters():
        parameter.grad = torch.full_like(parameter, float("inf"))
    t._check_gradients([t.supernet.space.max])
    t.accelerator.scaler = None
    with pytest.raises(MLFSError, match="a gradient became NaN or infinite"):
        t._check_gradients([t.supernet.space.max])


@pytest.mark.parametrize("steps", [[3], [3, 2, 4]])
def test_a_stream_needs_no_max_steps_beside_stage_steps(steps: list[int], tmp_path: Path) -> None:
    from datasets import IterableDataset

    from tests.trainers import rows

    data = IterableDataset.from_generator(lambda: iter(rows(32)))
    t: MLFSTrainer = trainer(tmp_path, train_dataset=data, stage_steps=steps)
    assert t.args.max_steps == -1
    assert t.train().global_step == sum(steps * 3 if len(steps) == 1 else steps)


@pytest.mark.parametrize(("name", "suffix"), [("llama", "ForCausalLM"), ("bert", "ForSequenceClassification")])
def test_the_mean_of_maxnet_is_the_loss_however_many_batches_a_step_accumulates(
    name: str, suffix: str, tmp_path: Path
) -> None:
    for batches in (1, 4):
        t = trainer(
            tmp_path / str(batches), name, suffix, stages_to_train=[0], stage_steps=[2], logging_steps=1,
            gradient_accumulation_steps=batches, per_device_train_batch_size=4 // batches,
        )  # fmt: skip
        t.train()
        logged = [entry for entry in t.state.log_history if "loss" in entry]
        assert len(logged) == 2
        for entry in logged:
            assert entry["max_loss"] == pytest.approx(entry["loss"], rel=1e-4)
