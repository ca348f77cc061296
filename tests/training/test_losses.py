"""The loss of a subnet: its formula, and that both ways to it, with and without logits, are one."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from mlfs.models.fused.lm_head import HEAD_INPUT
from mlfs.training.batch import Accumulation, Batch
from mlfs.training.distillation import HiddenStateDistance
from mlfs.training.losses import SubnetLoss
from mlfs.training.task import CausalLanguageModeling, Classification

HIDDEN, VOCABULARY, ALPHA = 8, 11, 0.7
KEPT = (0, 1)
LABELS = torch.tensor([[1, 2, 3, 4], [5, -100, 6, -100]])
MEANS = Accumulation(None, is_scaled=False, divisor=2, processes=1)
SHARES = Accumulation(torch.tensor(20), is_scaled=True, divisor=1, processes=2)


def states(width: int, seed: int) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(2, 4, width, generator=generator, dtype=torch.float64) for _ in range(3))


def outputs_of(width: int, seed: int, head: Any) -> dict[str, Any]:
    hidden_states = states(width, seed)
    logits = torch.nn.functional.linear(hidden_states[-1], head.own_weight[:, :width], head.own_bias)
    return {"logits": logits, "hidden_states": hidden_states, HEAD_INPUT: hidden_states[-1]}


def head_of(seed: int = 7) -> Any:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(VOCABULARY, HIDDEN, generator=generator, dtype=torch.float64)
    return SimpleNamespace(own_weight=weight, own_bias=weight[:, 0].clone())


def loss_of(task: Any, beta: float = 0.3, temperature: float = 2.0) -> SubnetLoss:
    return SubnetLoss(task, HiddenStateDistance(HIDDEN, 2, [beta], 4).double(), ALPHA, temperature)


def test_maxnet_learns_its_task_alone():
    batch = Batch({"labels": LABELS}, MEANS)
    task_loss = torch.tensor(2.5)
    found = loss_of(Classification())(batch, KEPT, outputs_of(HIDDEN, 0, head_of()), task_loss, teacher=None)
    assert found.loss is task_loss and found.parts == {"loss": task_loss}


def test_a_subnets_loss_is_that_of_the_formula():
    head, distance = head_of(), loss_of(Classification()).distance
    student, teacher = outputs_of(6, 1, head), outputs_of(HIDDEN, 2, head)
    batch, task_loss = Batch({"labels": LABELS}, MEANS), torch.tensor(2.5, dtype=torch.float64)
    found = loss_of(Classification())(batch, KEPT, student, task_loss, teacher)
    p, q = (torch.softmax(outputs["logits"][LABELS != -100] / 2, -1) for outputs in (teacher, student))
    kl = 4 * (p * (p / q).log()).sum(-1).mean()
    feature = torch.zeros((), dtype=torch.float64)
    for layer in (0, 1):
        projection = distance.projections[layer].detach()
        target = teacher["hidden_states"][layer + 1] @ projection.T
        projected = student["hidden_states"][layer + 1] @ projection[:, :6].T
        feature += 0.3 * (projected - target).pow(2).sum() / target.pow(2).sum()
    torch.testing.assert_close(found.parts, {
        "task": task_loss, "kl": kl, "feature": feature, "loss": (1 - ALPHA) * task_loss + ALPHA * kl + feature,
    })  # fmt: skip


@pytest.mark.parametrize("accumulation", [MEANS, SHARES], ids=["means", "shares"])
@pytest.mark.parametrize("task", [Classification(), CausalLanguageModeling()], ids=["masked", "causal"])
def test_from_what_goes_into_the_head_it_is_the_same_as_from_logits(task, accumulation):
    head, targets = head_of(), task.targets(LABELS)
    student, teacher = outputs_of(6, 1, head), outputs_of(HIDDEN, 2, head)
    inputs = {"labels": LABELS}
    total = torch.nn.functional.cross_entropy(student["logits"].flatten(0, 1), targets.flatten(), reduction="sum")
    task_loss = total / accumulation.items(targets)
    with_logits = loss_of(task)(Batch(inputs, accumulation), KEPT, student, task_loss, teacher)
    without = loss_of(task)(Batch(inputs, accumulation, head), KEPT, student, None, teacher)
    torch.testing.assert_close(without.parts, with_logits.parts)
    assert without.parts.keys() == {"task", "kl", "feature", "loss"}


def test_hidden_states_are_not_asked_for_where_no_layer_is_compared():
    head = head_of()
    student, teacher = ({"logits": outputs_of(width, width, head)["logits"]} for width in (6, HIDDEN))
    found = loss_of(Classification(), beta=0.0)(Batch({}, MEANS), KEPT, student, torch.tensor(1.0), teacher)
    assert found.parts.keys() == {"task", "kl", "loss"}
