"""Where calibration data has no labels, a model draws them from its own predictions."""

import pytest
import torch
from torch.nn import functional

from mlfs import MLFSError
from mlfs.supernet.permutation import permutation_of
from mlfs.supernet.targets import OwnTargets, loss_on
from tests.helpers.calibration import batches
from tests.supernets import elastic
from tests.tiny_models import CASES, inputs, make

ALL = [(name, suffix) for name, case in CASES.items() for suffix in case.classes]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(("name", "suffix"), ALL)
def test_every_kind_of_model_is_scored_without_labels(name, suffix):
    supernet = elastic(name, suffix)
    labelled = supernet.importance("gradient", batches(suffix))
    scores = supernet.importance("gradient", [inputs(), inputs("left", 1)])
    assert scores.keys() == labelled.keys()
    for key, values in scores.items():
        assert torch.isfinite(values).all() and values.any(), key
    again = supernet.importance("gradient", [inputs(), inputs("left", 1)])
    assert all(torch.equal(scores[key], again[key]) for key in scores)


def test_a_model_without_logits_is_scored_by_its_hidden_states():
    supernet = elastic("bert", "Model")
    scores = supernet.importance("gradient", [inputs()])
    assert all(torch.isfinite(values).all() and values.any() for values in scores.values())


def test_classes_are_drawn_as_often_as_the_model_predicts_them():
    logits = torch.tensor([0.0, 1.0, -1.0], dtype=torch.float64).repeat(20_000, 1)
    drawn = OwnTargets({"logits": logits}, generator=generator()).targets["logits"]
    shares = torch.bincount(drawn, minlength=3) / len(drawn)
    assert torch.allclose(shares.double(), logits[0].softmax(0), atol=0.01)  # three standard errors


def test_loss_against_drawn_classes_is_the_divergence_plus_the_entropy():
    outputs, other = (torch.randn(1, 4, generator=generator(i), dtype=torch.float64) for i in (1, 2))
    many = outputs.repeat(200_000, 1)
    targets = OwnTargets({"logits": many}, generator=generator())
    found = targets.loss({"logits": other.expand_as(many)}) - targets.loss({"logits": many})
    expected = functional.kl_div(other.log_softmax(-1), outputs.softmax(-1), reduction="batchmean")
    assert abs(found - expected) < 0.01


@pytest.mark.parametrize(
    ("shape", "problem_type"),
    [((5, 3), None), ((5, 7, 3), None), ((5, 1), None), ((5, 4), "regression"), ((5, 4), "multi_label_classification")],
)
def test_loss_is_least_where_the_outputs_are_what_was_drawn(shape, problem_type):
    outputs = {"logits": torch.randn(shape, generator=generator(3), dtype=torch.float64)}
    targets = OwnTargets(outputs, None, problem_type, generator())
    drawn = targets.targets["logits"]
    if drawn.shape == shape:
        certain = (2 * drawn - 1) * 50 if problem_type == "multi_label_classification" else drawn
    else:
        certain = functional.one_hot(drawn, shape[-1]).double() * 100
    assert targets.loss({"logits": certain}) < 1e-12 < targets.loss(outputs)


@pytest.mark.parametrize(
    ("shape", "problem_type"),
    [((5, 3), None), ((5, 7, 3), None), ((5, 1), None), ((5, 4), "regression"), ((5, 4), "multi_label_classification")],
)
def test_of_predictions_the_loss_is_least_at_the_predictions_and_rises_by_the_divergence(shape, problem_type):
    values = torch.randn(shape, generator=generator(3), dtype=torch.float64).requires_grad_()
    other = torch.randn(shape, generator=generator(4), dtype=torch.float64)
    targets = OwnTargets({"logits": values}, None, problem_type)
    least = targets.loss({"logits": values})
    least.backward()
    assert values.grad.abs().max() < 1e-12
    rise = (targets.loss({"logits": other}) - least).detach()
    values = values.detach()
    if problem_type == "multi_label_classification":
        yes, no = values.sigmoid(), (-values).sigmoid()
        expected = (
            yes * (values.sigmoid() / other.sigmoid()).log() + no * ((-values).sigmoid() / (-other).sigmoid()).log()
        )
    elif shape[-1] == 1 or problem_type == "regression":
        expected = (values - other).pow(2) / 2
    else:
        expected = values.softmax(-1) * (values.log_softmax(-1) - other.log_softmax(-1)) * shape[-1]
    assert torch.allclose(rise, expected.mean())


@pytest.mark.parametrize("how", [None, generator()])
def test_padding_does_not_count(how):
    values = torch.randn(2, 3, 5, generator=generator())
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    targets = OwnTargets({"logits": values}, mask, generator=how)
    other = torch.where(mask[..., None].bool(), values, values + torch.arange(5.0) * 100)
    assert targets.loss({"logits": other}) == targets.loss({"logits": values})
    assert targets.loss({"logits": values + torch.arange(5.0)}) != targets.loss({"logits": values})


def test_narrower_hidden_states_are_compared_with_their_leading_numbers():
    states = torch.randn(2, 3, 8, generator=generator(), dtype=torch.float64)
    targets = OwnTargets({"last_hidden_state": states}, generator=generator())
    drawn = targets.targets["last_hidden_state"]
    assert targets.loss({"last_hidden_state": drawn[..., :5]}) == 0


def test_labels_of_the_batch_come_first():
    model, batch = make("bert", "ForSequenceClassification"), batches("ForSequenceClassification")[0]
    assert torch.equal(loss_on(model, batch), model(**batch).loss)


def test_outputs_to_draw_nothing_from_are_refused():
    with pytest.raises(MLFSError, match=r"batches without labels need a model that gives logits .* not \['loss'\]"):
        OwnTargets({"loss": torch.zeros(())})


def test_an_unlabelled_order_differs_little_from_a_labelled_one():
    supernet = elastic("llama", "ForCausalLM")
    many = batches("ForCausalLM", 20)
    labelled = permutation_of(supernet.importance("gradient", many))
    bare = [{name: value for name, value in batch.items() if name != "labels"} for batch in many]
    drawn = permutation_of(supernet.importance("gradient", bare))
    same = [len(set(drawn[key][:20]) & set(order[:20])) / 20 for key, order in labelled.items() if key[0] == "ffn"]
    assert sum(same) / len(same) > 0.65  # by chance 0.5
