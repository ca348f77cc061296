"""Who divides a loss by what, when a step accumulates batches: as plain Trainer does."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy

from tests.trainers import one_step, rows, trainer
from tests.training.plain import assert_close, gradients_of, mlfs_and_plain

SEQUENCES = ("bert", "ForSequenceClassification")
TOKENS = ("bert", "ForTokenClassification")
TEXT = ("llama", "ForCausalLM")


def ragged(example: dict[str, Any], i: int) -> dict[str, Any]:
    """Leaves another number of labels in each row."""
    return {"labels": [-100] * (i * 5 % 8) + example["labels"][i * 5 % 8 :]}


def data_of(suffix: str) -> Any:
    data = rows(16, causal=suffix != "ForSequenceClassification")
    if suffix == "ForTokenClassification":
        data = data.map(lambda example: {"labels": [label % 2 for label in example["labels"]]})
    return data if suffix == "ForSequenceClassification" else data.map(ragged, with_indices=True)


def of_logits(logits: torch.Tensor, labels: torch.Tensor, **options: Any) -> torch.Tensor:
    if logits.shape[-1] > 2:  # of words: the next one
        logits, labels = logits[:, :-1], labels[:, 1:]
    return cross_entropy(logits.flatten(0, -2), labels.flatten(), **options)


def of_items(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
    return of_logits(outputs["logits"], labels, reduction="sum") / num_items_in_batch


class OfItems:
    """A loss of one's own that divides by the labels of all accumulated batches."""

    loss_is_scaled_for_ga: Any = True

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        if num_items_in_batch is None:  # the Trainer counts only for losses that are told
            num_items_in_batch = 16
        loss = of_items(outputs, labels, num_items_in_batch)
        return (loss, outputs) if return_outputs else loss


class Mean:
    """A loss of one's own that is a mean over its batch."""

    loss_is_scaled_for_ga: Any = False

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        loss = of_logits(outputs["logits"], labels)
        return (loss, outputs) if return_outputs else loss


@pytest.mark.parametrize("accumulate", [1, 4])
@pytest.mark.parametrize("model, options", [
    (SEQUENCES, {"compute_loss_func": of_items}), (TOKENS, {"compute_loss_func": of_items}),
    (TEXT, {"compute_loss_func": of_items}), (TEXT, {}), (TEXT, {"label_smoothing_factor": 0.1}),
    (TEXT, {"fused_head_loss": False}),
    (SEQUENCES, {"mixin": Mean}), (TOKENS, {"mixin": Mean}), (TEXT, {"mixin": Mean}), (SEQUENCES, {"mixin": OfItems}),
    (TEXT, {"mixin": OfItems}), (TEXT, {"mixin": type("Flag", (), {"loss_is_scaled_for_ga": False})}),
])  # fmt: skip
def test_a_step_has_the_gradients_of_plain_trainer(model, options, accumulate, tmp_path: Path) -> None:
    ours, plain = mlfs_and_plain(
        tmp_path, *model, per_device_train_batch_size=16 // accumulate, gradient_accumulation_steps=accumulate,
        train_dataset=data_of(model[1]), **options,
    )  # fmt: skip
    (found,), (expected,) = gradients_of(ours), gradients_of(plain)
    assert_close(found, expected)


@pytest.mark.parametrize("model", [SEQUENCES, TOKENS, TEXT])
def test_a_mean_over_each_batch_is_divided_by_their_number(model, tmp_path: Path) -> None:
    """By hand: plain Trainer takes means of classifiers for shares of the step, and sums them."""
    data = data_of(model[1])
    options = {"mixin": Mean} if model == TEXT else {}
    ours, _ = mlfs_and_plain(
        tmp_path, *model, per_device_train_batch_size=4, gradient_accumulation_steps=4, train_dataset=data, **options
    )
    supernet = ours.supernet
    total = torch.zeros(())
    for start in range(0, 16, 4):
        batch = {key: torch.tensor(value) for key, value in data[start : start + 4].items()}
        total = total + supernet.eval()(**batch).loss / 4
    trained = {name: p for name, p in supernet.model.named_parameters() if p.requires_grad}
    expected = torch.autograd.grad(total, list(trained.values()), allow_unused=True)
    (found,) = gradients_of(ours)
    assert_close(found, {n: g for n, g in zip(trained, expected, strict=True) if g is not None})


@pytest.mark.parametrize("how", ["sequential", "lockstep"])
@pytest.mark.parametrize("model", [SEQUENCES, TEXT])
def test_what_a_subnet_learns_from_maxnet_is_on_the_scale_of_its_task(model, how, tmp_path: Path) -> None:
    """A loss function of one's own that is the model's own gives the gradients of the model's own, distillation and
    all; a step of stage 2, of half the labels."""
    batch = {key: torch.tensor(value) for key, value in data_of(model[1])[:4].items()}
    found = {}
    for func in (None, of_items):
        t = trainer(tmp_path / str(func), *model, dropout_stages=[], distill_beta=[0.3], subnet_execution=how)
        t.compute_loss_func = func
        counted = (batch["labels"][..., 1:] if model == TEXT else batch["labels"]).ne(-100).sum()
        items = 2 * counted if func or model == TEXT else None
        found[func] = one_step(t, dict(batch), items)[1]
    assert_close(found[of_items], found[None])


@pytest.mark.parametrize("how", ["sequential", "lockstep"])
@pytest.mark.parametrize("model, options", [
    (SEQUENCES, {}), (TOKENS, {}), (("bert", "ForMaskedLM"), {}), (("bert", "ForMaskedLM"), {"fused_head_loss": False}),
    (TEXT, {}), (TEXT, {"fused_head_loss": False}), (TEXT, {"label_smoothing_factor": 0.1, "fused_head_loss": False}),
    (TEXT, {"label_smoothing_factor": 0.1}), (TOKENS, {"label_smoothing_factor": 0.1}),
    (("roberta", "ForQuestionAnswering"), {}), (("llama", "ForQuestionAnswering"), {}), (TEXT, {"own": True}),
])  # fmt: skip
def test_a_batch_without_a_counted_label_counts_as_zero(model, options, how, tmp_path: Path) -> None:
    options = dict(options)
    own = options.pop("own", False)
    t = trainer(tmp_path, *model, dropout_stages=[], distill_beta=[0.3], subnet_execution=how, **options)
    if own:
        t.compute_loss_func = lambda outputs, labels, num_items_in_batch=None: of_logits(outputs["logits"], labels)
    batch = {key: torch.tensor(value) for key, value in data_of(model[1])[:4].items()}
    batch["labels"].fill_(-100)
    items = torch.tensor(30) if model == TEXT else None
    if model[1] == "ForQuestionAnswering":
        del batch["labels"]
        batch |= {"start_positions": torch.full((4,), 99), "end_positions": torch.full((4,), 99)}
    loss, gradients = one_step(t, batch, items)
    assert loss == 0
    assert gradients and all(torch.equal(gradient, torch.zeros_like(gradient)) for gradient in gradients.values())
    assert all(value == 0 for value in t.means.take().values())


def test_a_run_goes_on_over_batches_without_labels(tmp_path: Path) -> None:
    """Two rows of three without a label, one at a time: whole steps have none."""
    data = data_of("ForCausalLM").map(lambda e, i: {"labels": [-100] * 9 if i % 3 else e["labels"]}, with_indices=True)
    t = trainer(tmp_path, *TEXT, train_dataset=data, per_device_train_batch_size=1, save_strategy="no", stage_steps=[6])
    t.train()
    assert all(torch.isfinite(p).all() for p in t.supernet.own_parameters().values())
    assert all(entry["loss"] == entry["loss"] for entry in t.state.log_history if "loss" in entry)


@pytest.mark.parametrize("model", [SEQUENCES, TOKENS, TEXT])
def test_drawn_once_a_step_four_batches_give_the_update_of_one(model, tmp_path: Path) -> None:
    """Task and divergence; the distance of hidden states is relative to the teacher's size in each batch."""
    data = data_of(model[1])
    if model == TOKENS:  # a mean over each batch: with as many labels in each they are those of one
        data = data.map(lambda example: {"labels": [1, 0, 1] * 3})
    found = {}
    for accumulate in (1, 4):
        t = trainer(
            tmp_path / str(accumulate), *model, train_dataset=data, per_device_train_batch_size=16 // accumulate,
            gradient_accumulation_steps=accumulate, stages_to_train=[2], stage_steps=[2], distill_beta=[0.0],
            subnet_draws="step", train_sampling_strategy="sequential", order="magnitude", save_strategy="no",
            max_grad_norm=0.0, optim="sgd",
        )  # fmt: skip
        found[accumulate] = gradients_of(t)
    for one, four in zip(found[1], found[4], strict=True):
        assert_close(four, one)


def test_each_accumulated_batch_draws_its_own_subnets_unless_asked(tmp_path: Path) -> None:
    t = trainer(tmp_path, subnets_per_step=4)
    t.stage, t.state.global_step = 2, 7
    assert len({tuple(t.draw_subnets()) for _ in range(4)}) > 1
    t.args.subnet_draws = "step"
    assert len({tuple(t.draw_subnets()) for _ in range(4)}) == 1
