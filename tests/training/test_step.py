"""One step: the gradients it makes, however the subnets run and batches accumulate, and what it does about NaN."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from mlfs import MLFSError, SuperTransformer
from mlfs.elastic.linear import ElasticLinear
from mlfs.training.sampling import BatchCounter
from tests.tiny_models import make
from tests.trainers import ONE_STEP, SPACE, one_step, own, rows, trainer


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

    t._batch_counter = BatchCounter()
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
                projection = t.distance.projections[layer]
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


def test_activation_checkpointing_gives_the_same_weights(tmp_path: Path) -> None:
    results = []
    for checkpointing in (False, True):
        options = {"activation_checkpointing": True} if checkpointing else {}
        t = trainer(tmp_path / str(checkpointing), save_strategy="no", stage_steps=[4], dropout_stages=[], **options)
        t.train()
        results.append(own(t.supernet))
    for name, value in results[0].items():
        assert torch.allclose(value, results[1][name], rtol=1e-4, atol=1e-6), name


def test_nan_loss_stops_and_keeps_the_last_good_checkpoint(tmp_path: Path) -> None:
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
