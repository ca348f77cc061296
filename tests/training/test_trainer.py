"""The trainer: what trains when, what an iteration computes, what is saved, and what an interrupted run resumes to."""

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
from datasets import Dataset

from mlfs import MLFSArguments, MLFSError, MLFSTrainer, SearchSpace, Subnet, SuperTransformer
from mlfs.elastic.linear import ElasticLinear
from mlfs.training.distillation import output_divergence
from mlfs.training.runs import last_checkpoint
from tests.tiny_models import CASES, VOCABULARY, make

SPACE = SearchSpace((48, 32, 24), (6, 4, 2), (40, 20), ((0, 1, 2, 3), (1, 3)))
ROOT = Path(__file__).parents[2]


def rows(count: int, seed: int = 0, causal: bool = False) -> Dataset:
    """Sequences that tell their class: label 1 where the first token is from the upper half of the vocabulary."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCABULARY, (count, 9), generator=generator)
    labels = ids if causal else (ids[:, 0] > VOCABULARY // 2).long()
    return Dataset.from_dict(
        {"input_ids": ids.tolist(), "labels": labels.tolist(), "attention_mask": [[1] * 9] * count}
    )


def trainer(folder: Path, name: str = "bert", suffix: str = "ForSequenceClassification", **options: Any) -> MLFSTrainer:
    """A trainer of a small model, one epoch of 8 steps per stage."""
    causal = "LM" in suffix
    settings: dict[str, Any] = {
        "output_dir": str(folder), "report_to": [], "use_cpu": True, "disable_tqdm": True, "stage_steps": [8],
        "per_device_train_batch_size": 4, "per_device_eval_batch_size": 8, "learning_rate": 5e-3, "logging_steps": 2,
        "save_steps": 3, "order_batches": 3, "projection_size": 8, "rank": 2,
    }  # fmt: skip
    extra = {key: options.pop(key) for key in ("callbacks", "train_dataset") if key in options}
    supernet = options.pop("supernet", None) or SuperTransformer(make(name, suffix), SPACE, rank=2)
    data = {"train_dataset": rows(32, causal=causal), "eval_dataset": rows(16, 1, causal), **extra}
    return MLFSTrainer(supernet, MLFSArguments(**{**settings, **options}), **data)


def own(supernet: SuperTransformer) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in supernet.own_parameters().items()}


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


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


def test_gradients_are_those_of_the_weighted_sum_of_losses(tmp_path: Path) -> None:
    """One training step against losses written out here, without the trainer, the distiller or merging."""
    t = trainer(tmp_path, dropout_stages=[], merge_stages=False, distill_beta=[0.3], temperature=2.0, gamma=0.7)
    supernet = t.supernet
    for name, p in supernet.own_parameters().items():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.1)
    for module in supernet.elastic():
        if isinstance(module, ElasticLinear):
            module.trained_stages = module.stages
    t.stage = 2
    supernet.train_stage(2)
    t.create_optimizer()
    t.current_gradient_accumulation_steps = 1
    batch = {k: torch.tensor(v) for k, v in rows(4).to_dict().items()}
    t.state.global_step = 5
    t.training_step(supernet.model, dict(batch))
    found = {n: p.grad.clone() for n, p in supernet.own_parameters().items() if p.grad is not None}
    supernet.model.zero_grad()

    t._draws = (-1, 0)
    subnets = t.draw_subnets()
    assert subnets[0] == SPACE.max and len(subnets) == 4
    supernet.model.eval()
    used = [supernet.count_trainable(s) for s in subnets]
    weights = [(used[0] / n) ** 0.7 for n in used]
    total, teacher = torch.zeros(()), None
    for subnet, weight in zip(subnets, weights, strict=True):
        with supernet.activate(subnet):
            out = supernet(**batch, output_hidden_states=True)
        if teacher is None:
            teacher, loss = out, out.loss
        else:
            p, q = (torch.softmax(o.logits / 2, -1) for o in (teacher, out))
            kl = 4 * (p.detach() * (p.detach().log() - q.log())).sum(-1).mean()
            loss = 0.1 * out.loss + 0.9 * kl
            for i, layer in enumerate(subnet.layers):
                projection = t.distiller.projections[layer]
                goal = teacher.hidden_states[layer + 1].detach() @ projection.T
                mine = out.hidden_states[i + 1] @ projection[:, : subnet.hidden].T
                loss = loss + 0.3 * (mine - goal).pow(2).sum() / goal.pow(2).sum()
        total = total + loss * weight / sum(weights)
    total.backward()
    for name, gradient in found.items():
        expected = dict(supernet.own_parameters())[name].grad
        assert torch.allclose(gradient, expected, rtol=1e-4, atol=1e-6), name
    assert any("lora_A.2" in n for n in found) and not any("lora_A.1" in n for n in found)


LABELLED = [
    ("bert", "ForSequenceClassification"), ("bert", "ForTokenClassification"), ("distilbert", "ForMaskedLM"),
    ("llama", "ForCausalLM"), ("gpt2", "LMHeadModel"),
]  # fmt: skip
SMOOTHED = [(*model, smoothing) for model in LABELLED for smoothing in (0.0, 0.1)]


ONE_STEP: dict[str, Any] = {"dropout_stages": [], "distill_beta": [0.3]}


def one_step(t: MLFSTrainer, batch: dict[str, Any], items: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Loss and gradients of a step of stage 2, with stages that have an effect; gradients accumulate over two steps."""
    generator = torch.Generator().manual_seed(0)
    for key, p in t.supernet.own_parameters().items():
        if "lora_B" in key:
            p.data.copy_(torch.randn(p.shape, generator=generator) * 0.1)
    t.stage = 2
    t.supernet.train_stage(2)
    t.create_optimizer()
    t.current_gradient_accumulation_steps = 2
    t.state.global_step = 5
    loss = t.training_step(t.supernet.model, dict(batch), items)
    return loss, {n: p.grad for n, p in t.supernet.own_parameters().items() if p.grad is not None}


@pytest.mark.parametrize("name, suffix, smoothing", [*SMOOTHED, ("roberta", "ForQuestionAnswering", 0.0)])
def test_lockstep_gives_the_gradients_of_one_subnet_after_the_other(tmp_path, name, suffix, smoothing) -> None:
    batch = {k: torch.tensor(v) for k, v in rows(4, causal=suffix != "ForSequenceClassification").to_dict().items()}
    batch["attention_mask"][1, 5:] = 0
    if suffix == "ForQuestionAnswering":
        batch |= {"start_positions": torch.tensor([1, 2, 0, 3]), "end_positions": torch.tensor([4, 4, 8, 3])}
        del batch["labels"]
    elif suffix == "ForTokenClassification":
        batch["labels"] = batch["labels"] % 2
    if suffix != "ForSequenceClassification" and "labels" in batch:
        batch["labels"][0, 3:] = -100
    found, losses = {}, {}
    for how in ("sequential", "lockstep"):
        items = (batch["labels"] != -100).sum() if suffix in ("ForCausalLM", "LMHeadModel") else None
        t = trainer(tmp_path / how, name, suffix, subnet_execution=how, label_smoothing_factor=smoothing, **ONE_STEP)
        losses[how], found[how] = one_step(t, batch, items)
    assert torch.allclose(losses["sequential"], losses["lockstep"], rtol=1e-5)
    assert found["sequential"].keys() == found["lockstep"].keys()
    for key, gradient in found["sequential"].items():
        largest = gradient.abs().max()
        assert (found["lockstep"][key] - gradient).abs().max() <= 1e-4 * largest + 1e-7, key


def test_sandwich_draws_maxnet_the_narrowest_a_level_and_an_independent_one(tmp_path) -> None:
    t = trainer(tmp_path, subnets_per_step=4)
    t.stage = 2
    drawn = []
    for step in range(300):
        t.state.global_step = step
        drawn.append(t.draw_subnets())
    assert all(subnets[0] == SPACE.max for subnets in drawn)
    narrow = {Subnet(SPACE.hidden[-1], SPACE.heads[-1], SPACE.ffn[-1], layers) for layers in SPACE.layers}
    assert {subnets[1] for subnets in drawn} == narrow
    levels = {SPACE.sample_level(torch.Generator().manual_seed(i)) for i in range(200)}
    assert {subnets[2] for subnets in drawn} == levels
    assert len({subnets[3] for subnets in drawn}) > len(levels)
    t.stage = 1
    widths = [t.draw_subnets() for t.state.global_step in range(300)]
    assert all(subnet.layers == SPACE.layers[0] for subnets in widths for subnet in subnets)
    t.args.subnet_sampling = "random"
    assert len({t.draw_subnets()[1] for t.state.global_step in range(300)}) > 2 * len(narrow)


def test_ignored_labels_are_ignored_by_the_distillation() -> None:
    torch.manual_seed(0)
    logits, teacher = torch.randn(2, 5, 7), torch.randn(2, 5, 7)
    labels = torch.tensor([[1, 2, -100, 3, -100], [-100, 1, 1, -100, 2]])
    full = output_divergence({"logits": logits}, {"logits": teacher}, labels, None)
    moved = logits.clone()
    moved[labels == -100] += torch.randn(4, 7)
    assert torch.equal(full, output_divergence({"logits": moved}, {"logits": teacher}, labels, None))
    assert not torch.equal(full, output_divergence({"logits": moved}, {"logits": teacher}, None, None))
    shifted = output_divergence({"logits": logits}, {"logits": teacher}, labels, None, causal=True)
    moved = logits.clone()
    moved[0, 1] += 1  # the token before an ignored label
    assert torch.equal(shifted, output_divergence({"logits": moved}, {"logits": teacher}, labels, None, causal=True))
    moved[0, 0] += torch.randn(7)
    assert not torch.equal(
        shifted, output_divergence({"logits": moved}, {"logits": teacher}, labels, None, causal=True)
    )


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


def test_activation_checkpointing_gives_the_same_weights(tmp_path: Path) -> None:
    results = []
    for checkpointing in (False, True):
        options = {"activation_checkpointing": True} if checkpointing else {}
        t = trainer(tmp_path / str(checkpointing), save_strategy="no", stage_steps=[4], dropout_stages=[], **options)
        t.train()
        results.append(own(t.supernet))
    for name, value in results[0].items():
        assert torch.allclose(value, results[1][name], rtol=1e-4, atol=1e-6), name


def test_accumulating_two_half_batches_equals_one_batch(tmp_path: Path) -> None:
    """For a causal LM, whose loss is a mean over all tokens of the accumulated batch."""
    results = []
    for size, accumulate in ((8, 1), (4, 2)):
        t = trainer(
            tmp_path / str(size), "llama-tied", "ForCausalLM", save_strategy="no", per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulate, stage_steps=[2], dropout_stages=[], subnets_per_step=2,
            stages_to_train=[0, 1], order="magnitude", distill_beta=[0.0],
        )  # fmt: skip
        t.train()
        results.append(own(t.supernet))
    for name, value in results[0].items():
        assert torch.allclose(value, results[1][name], rtol=2e-3, atol=2e-5), name


def test_early_stopping_ends_a_stage_and_the_best_checkpoint_is_loaded(tmp_path: Path) -> None:
    from transformers import EarlyStoppingCallback

    t = trainer(
        tmp_path, eval_strategy="steps", eval_steps=1, save_steps=1, load_best_model_at_end=True, learning_rate=1.0,
        metric_for_best_model="loss", greater_is_better=False, stage_steps=[20], max_grad_norm=0.0,
        callbacks=[EarlyStoppingCallback(1)],
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
from tests.training.test_trainer import trainer
trainer(Path(sys.argv[1])).train(resume_from_checkpoint=sys.argv[2] == "resume")
"""


def start(folder: Path, how: str) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, "-c", _SCRIPT, str(folder), how], env=environment, cwd=ROOT)


@pytest.mark.parametrize("stage,checkpoint", [(1, 3), (2, 6)])
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


def test_a_half_written_checkpoint_is_passed_over(tmp_path: Path) -> None:
    t = trainer(tmp_path, stages_to_train=[0])
    t.train()
    folder = tmp_path / "stage-0"
    assert last_checkpoint(folder) == folder / "checkpoint-8"
    state = folder / "checkpoint-8" / "trainer_state.json"
    state.write_text(state.read_text()[:50])
    assert last_checkpoint(folder) == folder / "checkpoint-6"
    (folder / "checkpoint-6" / "mlfs.json").unlink()
    assert last_checkpoint(folder) == folder / "checkpoint-3"
    with pytest.raises(MLFSError, match="half-written"):
        trainer(tmp_path, stages_to_train=[0]).train(resume_from_checkpoint=str(folder / "checkpoint-6"))


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


def test_nan_loss_stops_and_keeps_the_last_good_checkpoint(tmp_path: Path) -> None:
    from transformers import TrainerCallback

    class Poison(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
            if state.global_step == 4:
                next(p for p in model.parameters() if p.requires_grad).data.fill_(float("nan"))

    t = trainer(tmp_path, callbacks=[Poison()])
    with pytest.raises(MLFSError, match=r"NaN.*stage 0, step 5, subnet 48/6/40/4.*checkpoint-3.*learning rate"):
        t.train()
    saved = SuperTransformer.from_pretrained(
        tmp_path / "stage-0" / "checkpoint-3", make("bert", "ForSequenceClassification")
    )
    assert all(torch.isfinite(p).all() for p in saved.own_parameters().values())


@pytest.mark.parametrize("options,message", [
    ({"stages_to_train": [1, 0]}, "ascending"), ({"stage_epochs": [1.0, 2.0]}, "one for each"),
    ({"stage_steps": [0]}, "positive"), ({"distill_alpha": 1.5}, "distill_alpha"), ({"gamma": -1}, "gamma"),
    ({"subnets_per_step": 0}, "subnets_per_step"), ({"order": "best"}, "order"), ({"palette": "{"}, "JSON"),
    ({"palette": '{"x": {"hidden": 47, "heads": 6, "ffn": 40, "layers": [0]}}'}, "outside the space"),
    ({"distill_beta": [0.1, 0.2]}, "4 layers"), ({"temperature": 0.0}, "temperature"),
])  # fmt: skip
def test_bad_option_is_refused_with_its_name(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(MLFSError, match=message):
        trainer(tmp_path, **options)


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
