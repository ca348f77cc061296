"""The trainer: what trains when, what is saved, and what an interrupted run resumes to."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from mlfs import MLFSError, SuperTransformer
from mlfs.elastic.linear import ElasticLinear
from mlfs.training.runs import last_checkpoint
from tests.tiny_models import CASES, make
from tests.trainers import SPACE, assert_same, own, rows, trainer

ROOT = Path(__file__).parents[2]


def test_each_stage_changes_its_own_adapters_and_the_head_only(tmp_path: Path) -> None:
    t = trainer(tmp_path, save_strategy="no", order="none")
    base = {n: p.detach().clone() for n, p in t.supernet.base_parameters().items()}
    before = own(t.supernet)
    seen = []
    for stage in range(3):
        t.args.stages_to_train = [stage]
        t.train()
        after = own(t.supernet)
        changed = {n for n in after if not torch.equal(before[n], after[n])}
        kinds = {n.rsplit("lora_", 1)[1] if "lora_" in n else "head" for n in changed}
        assert kinds == {f"A.{stage}", f"B.{stage}", "head"}
        before, seen = after, [*seen, stage]
    assert_same(base, {n: p.detach() for n, p in t.supernet.base_parameters().items()})


@pytest.mark.usefixtures("reference")  # Adam makes much of what rounds to about zero
def test_merging_stages_gives_the_same_run_to_rounding(tmp_path: Path) -> None:
    results = []
    for merge in (True, False):
        t = trainer(tmp_path / str(merge), merge_stages=merge, save_strategy="no", dropout_stages=[])
        t.train()
        results.append(own(t.supernet))
        assert all(m._merged is None for m in t.supernet.elastic() if isinstance(m, ElasticLinear))
    for name, value in results[0].items():
        assert torch.allclose(value, results[1][name], rtol=1e-2, atol=1e-3), name


@pytest.mark.parametrize("name,suffix", [(n, CASES[n].classes[0]) for n in ("bert", "gpt2", "llama-tied", "qwen3")])
def test_a_run_trains_saves_and_reloads(name: str, suffix: str, tmp_path: Path) -> None:
    t = trainer(tmp_path, name, suffix, eval_strategy="epoch")
    t.train()
    batch = {k: torch.tensor(v) for k, v in rows(4, 3).to_dict().items() if k != "labels"}
    again = SuperTransformer.from_pretrained(tmp_path, make(name, suffix))
    for subnet in (SPACE.max, SPACE.min):
        with t.supernet.activate(subnet), again.activate(subnet), torch.no_grad():
            t.supernet.model.eval()
            assert torch.equal(t.supernet(**batch).logits, again.eval()(**batch).logits)
    history = json.loads((tmp_path / "log_history.json").read_text())
    keys = set().union(*history)
    assert {"max_loss", "min_loss", "min_task", "min_kl", "min_feature", "rest_loss"} <= keys
    assert {"eval_max_loss", "eval_min_loss", "eval_medium_parameters", "eval_min_latency", "eval_loss"} <= keys
    steps = [h["step"] for h in history]
    assert steps == sorted(steps) and steps[-1] == 24


def test_learning_lowers_the_loss_of_every_size(tmp_path: Path) -> None:
    t = trainer(tmp_path, stage_steps=[60], save_strategy="no", train_dataset=rows(256), learning_rate=5e-3)
    before = t.evaluate()
    t.train()
    after = t.evaluate()
    for name in ("max", "min"):
        assert after[f"eval_{name}_loss"] < before[f"eval_{name}_loss"] - 0.02


@pytest.mark.parametrize("options", [
    {"gradient_accumulation_steps": 2}, {"bf16": True}, {"label_smoothing_factor": 0.1},
    {"train_sampling_strategy": "group_by_length"}, {"activation_checkpointing": True},
    {"projection": "learned"}, {"train_norms": True}, {"order": "magnitude"}, {"order": "activation"},
    {"subnet_sampling": "random", "gamma_normalization": "count"}, {"max_grad_norm": 0.0}, {"distill_beta": [0.0]},
])  # fmt: skip
def test_option_runs_and_reloads(options: dict[str, Any], tmp_path: Path) -> None:
    t = trainer(tmp_path, stage_steps=[3], save_strategy="no", **options)
    t.train()
    assert "forward" not in t.supernet.model.__dict__  # what autocast put there is gone
    again = SuperTransformer.from_pretrained(tmp_path, make("bert", "ForSequenceClassification"))
    assert_same(own(t.supernet), own(again))
    if options.get("train_norms"):
        name = "bert.encoder.layer.0.output.LayerNorm.weight"
        assert name in own(again) and not torch.equal(
            own(again)[name], make("bert", "ForSequenceClassification").get_parameter(name)
        )


def test_mixed_precision_holds_in_every_stage(tmp_path: Path) -> None:
    t = trainer(tmp_path, bf16=True, save_strategy="no", stage_steps=[1])
    seen = set()
    layer = next(module for module in t.supernet.elastic() if isinstance(module, ElasticLinear))
    layer.register_forward_hook(lambda module, args, output: seen.add((t.is_in_train, t.stage, output.dtype)))
    t.train()
    assert {(stage, dtype) for training, stage, dtype in seen if training} == {(s, torch.bfloat16) for s in range(3)}


def test_early_stopping_ends_a_stage_and_the_best_checkpoint_is_loaded(tmp_path: Path) -> None:
    from transformers import EarlyStoppingCallback

    t = trainer(
        tmp_path, eval_strategy="steps", eval_steps=1, save_steps=1, load_best_model_at_end=True, learning_rate=1.0,
        metric_for_best_model="loss", greater_is_better=False, stage_steps=[20], max_grad_norm=0.0,
        stop_ends="stage", callbacks=[EarlyStoppingCallback(1)],
    )  # fmt: skip
    t.train()
    for stage in range(3):
        state = json.loads((tmp_path / f"stage-{stage}" / "trainer_state.json").read_text())
        assert state["global_step"] < 20
    best = state["best_model_checkpoint"]
    again = SuperTransformer.from_pretrained(best, make("bert", "ForSequenceClassification"))
    assert_same(own(t.supernet), own(again))


def test_one_stage_alone_continues_a_saved_earlier_one(tmp_path: Path) -> None:
    whole = trainer(tmp_path / "whole", save_strategy="no")
    whole.train()
    first = trainer(tmp_path / "parts", stages_to_train=[0], save_strategy="no")
    first.train()
    saved = SuperTransformer.from_pretrained(tmp_path / "parts" / "stage-0", make("bert", "ForSequenceClassification"))
    rest = trainer(tmp_path / "rest", supernet=saved, stages_to_train=[1, 2], save_strategy="no")
    rest.train()
    assert_same(own(whole.supernet), own(rest.supernet))


_SCRIPT = """
import sys
from pathlib import Path
from tests.trainers import trainer
trainer(Path(sys.argv[1])).train(resume_from_checkpoint=sys.argv[2] == "resume")
"""


def start(folder: Path, how: str) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, "-c", _SCRIPT, str(folder), how], env=environment, cwd=ROOT)


@pytest.mark.parametrize("stage,checkpoint", [pytest.param(1, 3, marks=pytest.mark.soak), (2, 6)])
def test_a_killed_run_resumes_to_the_same_weights(stage: int, checkpoint: int, tmp_path: Path) -> None:
    """kill -9 in the middle of a stage, then resuming, against a run that was left alone: equal bit for bit."""
    torch.set_num_threads(1)
    whole = trainer(tmp_path / "whole")
    whole.train()
    process = start(tmp_path / "killed", "start")
    waited = tmp_path / "killed" / f"stage-{stage}" / f"checkpoint-{checkpoint}" / "trainer_state.json"
    deadline = time.monotonic() + 240
    while not waited.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert waited.exists() and not (waited.parents[1] / "mlfs.json").exists(), "the run was over before it was killed"
    assert start(tmp_path / "killed", "resume").wait(timeout=240) == 0
    resumed = SuperTransformer.from_pretrained(tmp_path / "killed", make("bert", "ForSequenceClassification"))
    assert_same(own(whole.supernet), own(resumed))
    assert resumed.permutation == whole.supernet.permutation


def test_resuming_with_other_parameters_that_train_is_refused_in_one_line(tmp_path: Path) -> None:
    options = {"stages_to_train": [0], "stage_steps": [6], "save_steps": 3, "save_strategy": "steps"}
    trainer(tmp_path, **options).train()
    (tmp_path / "stage-0" / "mlfs.json").unlink()
    with pytest.raises(MLFSError, match=r"optimizer of .*checkpoint-6 does not fit .*training_args\.json") as raised:
        trainer(tmp_path, train_head=False, **options).train(resume_from_checkpoint=True)
    assert "\n" not in str(raised.value)


def test_a_full_disk_while_saving_leaves_the_previous_checkpoint(tmp_path: Path, monkeypatch: Any) -> None:
    import mlfs.supernet.checkpoint as checkpoint

    real, calls = checkpoint.save_file, []

    def full(*args: Any, **kwargs: Any) -> None:
        calls.append(1)
        if len(calls) > 1:
            raise OSError(28, "No space left on device")
        real(*args, **kwargs)

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(MLFSError, match=r"No space left.*last whole checkpoint is .*checkpoint-3.*resume"):
        trainer(tmp_path).train()
    monkeypatch.undo()
    folder = tmp_path / "stage-0"
    assert last_checkpoint(folder) == folder / "checkpoint-3" and not (folder / "checkpoint-6").exists()
    SuperTransformer.from_pretrained(folder / "checkpoint-3", make("bert", "ForSequenceClassification"))


def test_an_earlier_run_is_not_overwritten_unless_asked(tmp_path: Path) -> None:
    first = trainer(tmp_path, stages_to_train=[0], stage_steps=[1])
    first.train()
    saved = (tmp_path / "stage-0" / "mlfs.json").read_text()
    with pytest.raises(MLFSError, match=r"holds a run already.*resume_from_checkpoint"):
        trainer(tmp_path, stages_to_train=[0]).train()
    assert (tmp_path / "stage-0" / "mlfs.json").read_text() == saved
    trainer(tmp_path, stages_to_train=[0], stage_steps=[2], overwrite_run=True).train()
    assert (tmp_path / "stage-0" / "mlfs.json").read_text() != saved


def test_resuming_with_other_options_is_refused(tmp_path: Path) -> None:
    trainer(tmp_path, stages_to_train=[0]).train()
    other = SuperTransformer(make("bert", "ForSequenceClassification"), SPACE, rank=3)
    with pytest.raises(MLFSError, match="another rank"):
        trainer(tmp_path, supernet=other).train(resume_from_checkpoint=True)
