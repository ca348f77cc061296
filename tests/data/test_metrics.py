import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    EvalPrediction,
    GPT2Config,
    GPT2LMHeadModel,
    Trainer,
    TrainingArguments,
    default_data_collator,
)

from mlfs.data.metrics import compute_metrics_for, main_metric, perplexity, preprocess_logits_for_metrics
from mlfs.errors import MLFSError


def _logits(classes: list[int], count: int = 2) -> np.ndarray:
    return np.eye(count)[classes]


def _measure(task: str, predictions, labels, **options) -> dict[str, float]:
    return compute_metrics_for(task, **options)(EvalPrediction(predictions, np.asarray(labels)))


@pytest.mark.parametrize(
    ("glue_name", "num_labels", "names"),
    [
        (None, 2, {"accuracy", "f1"}),
        (None, 3, {"accuracy"}),
        (None, None, {"accuracy"}),
        ("sst2", 2, {"accuracy"}),
        ("rte", 2, {"accuracy"}),
        ("mnli", 3, {"accuracy"}),
        ("mrpc", 2, {"accuracy", "f1"}),
        ("qqp", 2, {"accuracy", "f1"}),
        ("cola", 2, {"matthews_correlation"}),
    ],
)
def test_classification_has_the_metrics_of_its_glue_task(glue_name, num_labels, names):
    measured = _measure(
        "classification", _logits([0, 1, 1, 0]), [0, 1, 0, 1], glue_name=glue_name, num_labels=num_labels
    )
    assert set(measured) == names
    assert all(type(value) is float for value in measured.values())
    assert main_metric("classification", glue_name)[0] in names


def test_values_of_accuracy_f1_and_matthews_are_those_worked_out_by_hand():
    predicted, labels = [1, 1, 1, 0, 0, 1], [1, 1, 0, 0, 1, 1]  # 3 true positives, 1 false one, 1 missed, 1 negative
    measured = _measure("classification", _logits(predicted), labels, glue_name="mrpc")
    assert measured == pytest.approx({"accuracy": 4 / 6, "f1": 2 * 3 / (2 * 3 + 1 + 1)})
    matthews = _measure("classification", _logits(predicted), labels, glue_name="cola")["matthews_correlation"]
    assert matthews == pytest.approx((3 * 1 - 1 * 1) / np.sqrt(4 * 4 * 2 * 2))


def test_f1_is_zero_not_an_error_when_class_1_is_never_predicted():
    assert _measure("classification", _logits([0, 0]), [1, 1], num_labels=2)["f1"] == 0.0


def test_regression_has_both_correlations_and_the_error_but_for_stsb():
    values, labels = np.array([[1.0], [2.0], [9.0]], dtype=np.float32), [1.0, 2.0, 3.0]
    measured = _measure("regression", values, labels)
    assert measured["spearmanr"] == pytest.approx(1.0)
    assert measured["pearson"] == pytest.approx(np.corrcoef(values[:, 0], labels)[0, 1])
    assert measured["mse"] == pytest.approx(12.0)
    assert set(_measure("regression", values, labels, glue_name="stsb")) == {"pearson", "spearmanr"}


def test_correlation_with_a_constant_is_zero():
    assert _measure("regression", np.ones((4, 1)), [1.0, 2.0, 3.0, 4.0], glue_name="stsb") == {
        "pearson": 0.0,
        "spearmanr": 0.0,
    }


def test_of_a_tuple_of_predictions_the_logits_count():
    hidden_states = np.full((2, 5, 7), np.nan)
    assert _measure("classification", (_logits([0, 1]), hidden_states), [0, 1])["accuracy"] == 1.0


@given(st.integers(1, 4), st.integers(2, 9), st.integers(2, 6), st.integers(0, 2**32 - 1))
def test_token_accuracy_equals_the_shifted_comparison(batch, length, vocabulary, seed):
    random = torch.Generator().manual_seed(seed)
    logits = torch.randn(batch, length, vocabulary, generator=random)
    labels = torch.randint(vocabulary, (batch, length), generator=random)
    labels[torch.rand(batch, length, generator=random) < 0.3] = -100
    predicted = preprocess_logits_for_metrics((logits, "hidden states"), labels)
    assert predicted.shape == labels.shape and (predicted[:, 0] == -100).all()
    before, target = logits[:, :-1].argmax(-1), labels[:, 1:]
    kept = target != -100
    expected = (before == target)[kept].float().mean().item() if kept.any() else 0.0
    measured = _measure("causal-lm", predicted.numpy(), labels.numpy())
    assert measured == {"token_accuracy": pytest.approx(expected)}


def test_token_accuracy_ignores_what_the_trainer_pads():
    predicted, labels = np.array([[-100, 3, 4, -100]]), np.array([[7, 3, 5, -100]])
    assert _measure("causal-lm", predicted, labels) == {"token_accuracy": 0.5}


def test_trainer_evaluates_a_language_model_with_them(tmp_path):
    torch.manual_seed(0)
    config = GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=11, n_positions=6, bos_token_id=0, eos_token_id=0)
    model = GPT2LMHeadModel(config).eval()
    ids = torch.randint(11, (5, 6))
    rows = [{"input_ids": row, "labels": row} for row in ids.tolist()]
    trainer = Trainer(
        model,
        TrainingArguments(str(tmp_path), per_device_eval_batch_size=2, report_to=[], use_cpu=True, disable_tqdm=True),
        eval_dataset=rows,
        data_collator=default_data_collator,
        compute_metrics=compute_metrics_for("causal-lm"),
        preprocess_logits_for_metrics=preprocess_logits_for_metrics,
    )
    measured = trainer.evaluate()
    with torch.no_grad():
        expected = (model(ids).logits[:, :-1].argmax(-1) == ids[:, 1:]).float().mean().item()
    assert measured["eval_token_accuracy"] == pytest.approx(expected)
    assert f"eval_{main_metric('causal-lm')[0]}" in measured


def test_main_metric_says_which_way_is_better():
    assert main_metric("classification") == ("accuracy", True)
    assert main_metric("classification", "cola") == ("matthews_correlation", True)
    assert main_metric("regression", "stsb") == ("pearson", True)
    assert main_metric("causal-lm") == ("loss", False)


def test_perplexity_is_exp_of_the_loss_and_never_overflows():
    assert perplexity(np.log(20.0)) == pytest.approx(20.0)
    assert perplexity(1e5) == float("inf")


def test_unknown_task_and_diverged_predictions_are_one_line_errors():
    for call in (lambda: compute_metrics_for("auto"), lambda: main_metric("x")):
        with pytest.raises(MLFSError, match="expected classification, regression or causal-lm"):
            call()
    with pytest.raises(MLFSError, match="not finite"):
        _measure("classification", np.array([[np.nan, 0.0]]), [0])


@pytest.mark.parametrize(("zeros", "ones", "uneven"), [(6, 4, False), (61, 39, True), (39, 61, True), (10, 0, True)])
def test_uneven_classes_of_local_files_have_matthews_correlation_too(zeros, ones, uneven):
    labels = [0] * zeros + [1] * ones
    predicted = [0, 1] * (len(labels) // 2) + [0] * (len(labels) % 2)
    found = _measure("classification", _logits(predicted), labels, num_labels=2)
    assert ("matthews_correlation" in found) == uneven
    if uneven:
        expected = _measure("classification", _logits(predicted), labels, glue_name="cola")["matthews_correlation"]
        assert found["matthews_correlation"] == expected
    assert "matthews_correlation" not in _measure("classification", _logits(predicted), labels, glue_name="sst2")


def test_classes_that_are_named_by_number_are_counted_whatever_the_numbers():
    assert "matthews_correlation" in _measure("classification", _logits([5, 5, 7], 9), [7, 7, 7], num_labels=9)
