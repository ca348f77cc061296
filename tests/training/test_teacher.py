"""The frozen teacher: the whole model as it was before widths and depths trained."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from mlfs import MLFSError, MLFSTrainer
from mlfs.training.teacher import FrozenTeacher
from tests.tiny_models import inputs, logits_of
from tests.trainers import assert_same, cut_off, own, rows, trainer

KINDS = [("bert", "ForSequenceClassification"), ("gpt2", "LMHeadModel"), ("llama-tied", "ForCausalLM")]


class Teachers(TrainerCallback):
    """Keeps what the teacher says of one batch at each step."""

    def __init__(self) -> None:
        self.said: list[tuple[int, torch.Tensor]] = []
        self.trainer: Any = None

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        t = self.trainer
        if t.teacher is not None:
            self.said.append((t.stage, logits_of(t.teacher(inputs(), True, False)).clone()))


def watched(folder: Path, name: str = "bert", suffix: str = "ForSequenceClassification", **options: Any) -> Any:
    teachers = Teachers()
    t = trainer(folder, name, suffix, teacher="frozen", callbacks=[teachers], **options)
    teachers.trainer = t
    return t, teachers


@pytest.mark.parametrize(
    "name, suffix, options",
    [
        (*KINDS[0], {}), (*KINDS[0], {"train_base": [1]}), (*KINDS[1], {"train_base": [0, 1, 2]}),
        (*KINDS[1], {"train_base": [1, 2]}), (*KINDS[2], {}), (*KINDS[2], {"train_base": [0, 1, 2]}),
    ],
)  # fmt: skip
def test_the_teacher_stays_what_stage_0_made(name: str, suffix: str, options: dict[str, Any], tmp_path: Path) -> None:
    t, teachers = watched(tmp_path, name, suffix, stage_steps=[4], **options)
    t.train()
    assert [stage for stage, _ in teachers.said] == [1] * 4 + [2] * 4
    first = teachers.said[0][1]
    assert all(torch.equal(first, said) for _, said in teachers.said)
    # what stage 0 made is that model
    again = trainer(tmp_path / "first", name, suffix, stages_to_train=[0], stage_steps=[4],
                    **{k: [s for s in v if s == 0] for k, v in options.items()})  # fmt: skip
    again.train()
    with torch.no_grad():
        expected = logits_of(again.supernet.eval()(**inputs()))
    torch.testing.assert_close(first, expected, rtol=1e-4, atol=1e-5)
    assert t.teacher is None
    with torch.no_grad():
        assert not torch.equal(first, logits_of(t.supernet.eval()(**inputs())))


@pytest.mark.parametrize("execution", ["sequential", "lockstep"])
@pytest.mark.parametrize(("name", "suffix"), KINDS)
def test_every_size_learns_from_it_and_maxnet_too(name: str, suffix: str, execution: str, tmp_path: Path) -> None:
    t = trainer(tmp_path, name, suffix, teacher="frozen", subnet_execution=execution, stage_steps=[2], logging_steps=1)
    t.train()
    logged = [entry for entry in t.state.log_history if entry.get("stage") in (1, 2) and "loss" in entry]
    assert len(logged) == 4
    for entry in logged:
        for kind in {key.partition("_")[0] for key in entry if key.endswith("_kl")}:
            task, kl, feature = (entry[f"{kind}_{part}"] for part in ("task", "kl", "feature"))
            assert entry[f"{kind}_loss"] == pytest.approx(0.1 * task + 0.9 * kl + feature, rel=1e-3)
    # in its first step maxnet is the teacher still
    assert abs(logged[0]["max_kl"]) < 1e-6 and logged[0]["max_feature"] < 1e-6
    assert logged[1]["max_kl"] > 0


@pytest.mark.parametrize(("name", "suffix"), KINDS)
def test_both_executions_give_the_same_weights(name: str, suffix: str, tmp_path: Path) -> None:
    runs = []
    for execution in ("sequential", "lockstep"):
        t = trainer(tmp_path / execution, name, suffix, teacher="frozen", subnet_execution=execution, stage_steps=[2])
        t.train()
        runs.append(own(t.supernet))
    for key, value in runs[0].items():
        torch.testing.assert_close(runs[1][key], value, rtol=1e-3, atol=1e-4)  # AdamW: steps of 5e-3


@pytest.mark.parametrize(("name", "suffix"), [KINDS[1], KINDS[2]])
def test_logits_are_left_out_only_where_the_teachers_head_is_the_models(name: str, suffix: str, tmp_path: Path) -> None:
    runs = []
    for fused in (True, False):
        # in stage 1 the head trains, and in stage 2 it is another than the teacher's
        t = trainer(
            tmp_path / str(fused),
            name,
            suffix,
            teacher="frozen",
            train_base=[1],
            fused_head_loss=fused,
            stage_steps=[2],
        )
        t.train()
        runs.append(own(t.supernet))
        if fused:
            t.stage = 2
            t._let_train()
            t.teach_with(FrozenTeacher(t.supernet))
            assert t.shares_head
            with torch.no_grad():
                t.supernet.model.get_output_embeddings().own_weight.mul_(1.1)
            t.teach_with(t.teacher)
            assert not t.shares_head
    for key, value in runs[0].items():
        torch.testing.assert_close(runs[1][key], value, rtol=1e-3, atol=1e-4)  # AdamW: steps of 5e-3


@pytest.mark.parametrize(  # every pair of two of them
    "options, stage, elsewhere",
    [
        ({}, 1, False), ({}, 2, True), ({"train_base": [0, 1, 2]}, 1, True), ({"train_base": [0, 1, 2]}, 2, False),
        ({"train_base": [2]}, 1, True), ({"train_base": [2]}, 2, False),
    ],
)  # fmt: skip
def test_a_run_goes_on_with_the_teacher_it_began_with(
    options: dict[str, Any], stage: int, elsewhere: bool, tmp_path: Path
) -> None:
    whole, _ = watched(tmp_path / "whole", **options)
    whole.train()

    cut, before = watched(tmp_path / "cut", **options)
    cut_off(cut, stage, 5)
    assert (tmp_path / "cut" / "stage-1" / ".teacher").exists()
    target = tmp_path / ("other" if elsewhere else "cut")
    rest, after = watched(target, **options)
    rest.train(resume_from_checkpoint=str(tmp_path / "cut") if elsewhere else True)
    assert torch.equal(before.said[0][1], after.said[-1][1])
    assert_same(own(rest.supernet), own(whole.supernet))


@pytest.mark.parametrize("fault", ["gone", "damaged"])
@pytest.mark.parametrize("order", ["gradient", "rotation"])
def test_a_teacher_that_cannot_be_read_is_made_of_stage_0(fault: str, order: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {"name": "llama", "suffix": "ForCausalLM", "order": order}
    whole, _ = watched(tmp_path / "whole", **options)
    whole.train()
    first, _ = watched(tmp_path / "cut", **options)
    cut_off(first, 1, 5)
    kept = tmp_path / "cut" / "stage-1" / ".teacher"
    (kept / "mlfs.json").write_text("{") if fault == "damaged" else shutil.rmtree(kept)
    rest, _ = watched(tmp_path / "cut", **options)
    rest.train(resume_from_checkpoint=True)
    assert_same(own(rest.supernet), own(whole.supernet))


def test_a_teacher_that_is_nowhere_is_named(tmp_path: Path) -> None:
    first, _ = watched(tmp_path)
    cut_off(first, 2, 5)
    for path in (tmp_path / "stage-1" / ".teacher", tmp_path / "stage-0"):
        shutil.rmtree(path)
    rest, _ = watched(tmp_path)
    with pytest.raises(MLFSError, match="the teacher that it began with"):
        rest.train(resume_from_checkpoint=True)


@pytest.mark.parametrize(
    "options, stage, anew",
    [
        ({"order": "rotation"}, 1, True), ({"order": "rotation"}, 2, False), ({"train_base": [1, 2]}, 1, False),
        ({"train_base": [1, 2]}, 2, True), ({"train_base": [0, 1, 2]}, 1, True), ({"train_base": [0, 1, 2]}, 2, False),
    ],
)  # fmt: skip
def test_a_run_that_was_cut_off_goes_on_in_this_process_too(
    options: dict[str, Any], stage: int, anew: bool, tmp_path: Path
) -> None:
    kind = {"name": "llama", "suffix": "ForCausalLM", **options}
    whole, _ = watched(tmp_path / "whole", **kind)
    whole.train()
    first, _ = watched(tmp_path / "cut", **kind)
    cut_off(first, stage, 5)
    rest = watched(tmp_path / "cut", **kind)[0] if anew else first
    rest.train(resume_from_checkpoint=True)
    assert_same(own(rest.supernet), own(whole.supernet))


def test_a_finished_run_can_be_repaired_and_trained_on(tmp_path: Path) -> None:
    whole, _ = watched(tmp_path)
    whole.train()
    expected = own(whole.supernet)
    (damaged,) = (tmp_path / "stage-2").glob("stages-*.safetensors")
    data = bytearray(damaged.read_bytes())
    data[-1] ^= 1
    damaged.write_bytes(bytes(data))
    rest, _ = watched(tmp_path)
    rest.train(resume_from_checkpoint=True)
    assert_same(own(rest.supernet), expected)
    again, _ = watched(tmp_path, overwrite_run=True)
    again.train(resume_from_checkpoint=str(tmp_path / "stage-1" / "checkpoint-3"))
    assert_same(own(again.supernet), expected)


@pytest.mark.parametrize("teacher", ["frozen", "maxnet"])
def test_what_a_user_keeps_beside_a_run_stays(teacher: str, tmp_path: Path) -> None:
    (tmp_path / "teacher").mkdir()
    (tmp_path / "teacher" / "mine.bin").write_text("x")
    trainer(tmp_path, teacher=teacher, stage_steps=[1], save_strategy="no").train()
    assert (tmp_path / "teacher" / "mine.bin").read_text() == "x"


def test_the_teacher_of_an_earlier_run_is_not_taken(tmp_path: Path) -> None:
    first, _ = watched(tmp_path)
    cut_off(first, 1, 3)
    other = trainer(tmp_path, teacher="maxnet", overwrite_run=True, seed=7)
    cut_off(other, 1, 5)
    assert not (tmp_path / "stage-1" / ".teacher").exists()
    new, said = watched(tmp_path, overwrite_run=True, seed=5, save_strategy="no", stage_steps=[2])
    new.train()
    plain, expected = watched(tmp_path / "new", seed=5, save_strategy="no", stage_steps=[2])
    plain.train()
    assert torch.equal(said.said[0][1], expected.said[0][1])


def test_the_teacher_runs_in_the_precision_of_the_others(tmp_path: Path) -> None:
    t = trainer(tmp_path, "llama", "ForCausalLM", teacher="frozen", bf16=True, stage_steps=[1], fused_head_loss=False)
    seen, keep = set(), t._keep_teacher

    def watches(*args: Any, **kwargs: Any) -> None:
        keep(*args, **kwargs)
        layer = t.teacher.model.model.layers[0].mlp
        layer.register_forward_hook(lambda module, given, output: seen.add(output.dtype))

    t._keep_teacher = watches
    t.train()
    assert seen == {torch.bfloat16}


@pytest.mark.parametrize("order", ["gradient", "rotation"])
def test_hidden_states_are_compared_in_one_order(order: str, tmp_path: Path) -> None:
    t = trainer(
        tmp_path, "llama", "ForCausalLM", teacher="frozen", order=order, stage_steps=[1], logging_steps=1,
        dropout_stages=[],
    )  # fmt: skip
    t.train()
    logged = next(entry for entry in t.state.log_history if entry.get("stage") == 1 and "max_feature" in entry)
    assert logged["max_feature"] < 1e-6  # in its first step maxnet is the teacher


def test_the_teacher_does_not_share_storage_and_needs_no_gradient(tmp_path: Path) -> None:
    t = trainer(tmp_path)
    teacher = FrozenTeacher(t.supernet)
    theirs = {p.data_ptr() for p in teacher.model.parameters()}
    assert not theirs & {p.data_ptr() for p in t.supernet.model.parameters()}
    assert not any(p.requires_grad for p in teacher.model.parameters()) and not teacher.model.training
    batch = inputs()
    assert not logits_of(teacher(batch, True, False)).requires_grad
    assert len(teacher(batch, True, False)["hidden_states"]) == 5
    assert teacher(batch, False, False).get("hidden_states") is None


def test_own_losses_are_taught_too(tmp_path: Path) -> None:
    class Own(MLFSTrainer):
        def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **_: Any) -> Any:
            labels = inputs.pop("labels")
            outputs = model(**inputs)
            loss = torch.nn.functional.cross_entropy(outputs.logits, labels)
            return (loss, outputs) if return_outputs else loss

    made = trainer(tmp_path, teacher="frozen", stage_steps=[2], logging_steps=1)
    t = Own(made.supernet, made.args, train_dataset=rows(16), eval_dataset=rows(8))
    t.train()
    assert any("max_kl" in entry for entry in t.state.log_history)


def test_an_unknown_teacher_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MLFSError, match="teacher='me': expected one of frozen, maxnet"):
        trainer(tmp_path, teacher="me")
