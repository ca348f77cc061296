"""What a model's outputs and labels are, and how far a student's outputs are from its teacher's."""

from typing import Any

import pytest
import torch
import transformers as tf

from mlfs.training.task import (
    CausalLanguageModeling,
    Classification,
    MultiLabelClassification,
    QuestionAnswering,
    Regression,
    task_of,
)
from tests.tiny_models import make


def test_ignored_labels_are_ignored_by_the_distillation() -> None:
    torch.manual_seed(0)
    logits, teacher = torch.randn(2, 5, 7), {"logits": torch.randn(2, 5, 7)}
    labels = {"labels": torch.tensor([[1, 2, -100, 3, -100], [-100, 1, 1, -100, 2]])}
    task = Classification()
    full = task.divergence({"logits": logits}, teacher, labels)
    moved = logits.clone()
    moved[labels["labels"] == -100] += torch.randn(4, 7)
    assert torch.equal(full, task.divergence({"logits": moved}, teacher, labels))
    assert not torch.equal(full, task.divergence({"logits": moved}, teacher, {}))
    task = CausalLanguageModeling()
    shifted = task.divergence({"logits": logits}, teacher, labels)
    moved = logits.clone()
    moved[0, 1] += 1  # the token before an ignored label
    assert torch.equal(shifted, task.divergence({"logits": moved}, teacher, labels))
    moved[0, 0] += torch.randn(7)
    assert not torch.equal(shifted, task.divergence({"logits": moved}, teacher, labels))


def test_without_labels_padding_is_ignored() -> None:
    logits, mask = torch.zeros(1, 5, 7), {"attention_mask": torch.tensor([[0, 0, 1, 1, 0]])}
    assert Classification().token_mask(logits, mask).tolist() == [[False, False, True, True, False]]
    # the output at a token is of the token after it
    assert CausalLanguageModeling().token_mask(logits, mask).tolist() == [[False, True, True, False]]
    assert Classification().token_mask(logits, {}) is None


@pytest.mark.parametrize("name, suffix, configured, task", [
    ("gpt2", "LMHeadModel", {}, CausalLanguageModeling), ("llama-tied", "ForCausalLM", {}, CausalLanguageModeling),
    ("bert", "ForMaskedLM", {}, Classification), ("bert", "ForTokenClassification", {}, Classification),
    ("roberta", "ForQuestionAnswering", {}, QuestionAnswering),
    ("bert", "ForSequenceClassification", {}, Classification),
    ("bert", "ForSequenceClassification", {"num_labels": 1}, Regression),
    ("bert", "ForSequenceClassification", {"problem_type": "regression"}, Regression),
    ("bert", "ForSequenceClassification", {"problem_type": "multi_label_classification"}, MultiLabelClassification),
    ("llama-tied", "ForCausalLM", {"num_labels": 1}, CausalLanguageModeling),
])  # fmt: skip
def test_the_task_is_found_from_class_and_configuration(name: str, suffix: str, configured: Any, task: type) -> None:
    model = make(name, suffix)
    for key, value in configured.items():
        setattr(model.config, key, value)
    assert type(task_of(model)) is task
    assert task_of(model).divides_by_items == (task is CausalLanguageModeling)


def test_a_model_that_takes_start_positions_answers_questions_whatever_its_name() -> None:
    class Own(tf.BertForQuestionAnswering):
        pass

    assert type(task_of(Own(make("bert", "ForSequenceClassification").config))) is QuestionAnswering


def test_multi_label_outputs_are_compared_label_by_label_through_sigmoids() -> None:
    torch.manual_seed(0)
    student, teacher = torch.randn(4, 3), torch.randn(4, 3)
    found = MultiLabelClassification().divergence({"logits": student}, {"logits": teacher}, {}, temperature=2.0)
    p, q = torch.sigmoid(teacher / 2), torch.sigmoid(student / 2)
    expected = 4 * (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()).mean()
    torch.testing.assert_close(found, expected)


def test_regression_compares_numbers_and_answers_are_compared_at_both_ends() -> None:
    torch.manual_seed(0)
    student, teacher = torch.randn(4, 6), torch.randn(4, 6)
    found = Regression().divergence({"logits": student}, {"logits": teacher}, {})
    torch.testing.assert_close(found, torch.nn.functional.mse_loss(student, teacher))
    found = QuestionAnswering().divergence(
        {"start_logits": student, "end_logits": teacher}, {"start_logits": teacher, "end_logits": student}, {}
    )
    log_p, log_q = torch.log_softmax(teacher, -1), torch.log_softmax(student, -1)
    there, back = (torch.nn.functional.kl_div(x, y, log_target=True, reduction="batchmean") for x, y in
                   ((log_q, log_p), (log_p, log_q)))  # fmt: skip
    torch.testing.assert_close(found, (there + back) / 2)


def test_a_causal_models_targets_are_the_next_tokens() -> None:
    labels = torch.tensor([[5, 6, -100, 7]])
    assert CausalLanguageModeling().targets(labels).tolist() == [[6, -100, 7, -100]]
    assert Classification().targets(labels) is labels
