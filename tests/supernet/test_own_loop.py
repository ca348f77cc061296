"""Training loops that are not MLFSTrainer's: one's own, Lightning's way, and transformers' plain Trainer."""

from typing import Any

import pytest
import torch
import transformers as tf
from datasets import Dataset
from torch import nn

from mlfs import ElasticLinear, MLFSError, SuperTransformer
from tests.helpers.runs import logits
from tests.supernets import distance, space_of
from tests.tiny_models import inputs, make


def fresh(name: str = "bert", suffix: str = "ForSequenceClassification") -> SuperTransformer:
    """A small model that drops nothing, so that two loops see the same."""
    model = make(name, suffix)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for key in {"attention_dropout", "dropout_prob"} & vars(module).keys():
            setattr(module, key, 0.0)
    torch.manual_seed(3)
    return SuperTransformer(model, space_of(name), rank=4)


def step(supernet: SuperTransformer, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    supernet(**inputs(), labels=torch.tensor([0, 1, 0])).loss.backward()
    optimizer.step()


def adapters(supernet: SuperTransformer, stage: int) -> list[torch.Tensor]:
    layers = [layer for layer in supernet.elastic() if isinstance(layer, ElasticLinear) and layer.stages]
    return [layer.lora_B[stage].detach().clone() for layer in layers]


def trained(supernet: nn.Module) -> list[nn.Parameter]:
    return [p for p in supernet.parameters() if p.requires_grad]


def test_an_optimizer_of_an_earlier_stage_is_refused_before_it_moves_anything():
    """As Lightning's configure_optimizers makes it: once, of what trains then."""
    supernet = fresh()
    optimizer = torch.optim.AdamW(trained(supernet))
    step(supernet, optimizer)
    for stage in (1, 2):
        supernet.train_stage(stage)
        before = [p.clone() for p in supernet.parameters()]
        with pytest.raises(MLFSError, match=f"holds stage 0 and not stage {stage}, which trains: make a") as raised:
            step(supernet, optimizer)
        assert "\n" not in str(raised.value)
        assert all(torch.equal(p, old) for p, old in zip(supernet.parameters(), before, strict=True))


def _new_each_stage(supernet: SuperTransformer, made: list[Any]) -> list[torch.optim.Optimizer]:
    return [torch.optim.SGD(trained(supernet), lr=0.1)]


def _one_of_all(supernet: SuperTransformer, made: list[Any]) -> list[torch.optim.Optimizer]:
    return made or [torch.optim.SGD(supernet.parameters(), lr=0.1)]


def _split_by_shape(supernet: SuperTransformer, made: list[Any]) -> list[torch.optim.Optimizer]:
    """As Muon is used: one optimizer of what is no matrix, frozen or not, and one of the matrices."""
    parts = [[p for p in supernet.parameters() if (p.dim() > 1) == matrix] for matrix in (False, True)]
    return made or [torch.optim.SGD(part, lr=0.1) for part in parts]


def _split_by_side(supernet: SuperTransformer, made: list[Any]) -> list[torch.optim.Optimizer]:
    """As LoRA+ is sometimes written: one optimizer of all A, one of all B."""
    named = [(name, p) for name, p in supernet.named_parameters() if "lora" in name]
    return made or [torch.optim.SGD([p for name, p in named if side in name], lr=0.1) for side in ("_A", "_B")]


def _head_apart(supernet: SuperTransformer, made: list[Any]) -> list[torch.optim.Optimizer]:
    head = list(supernet.get_submodule("model.classifier").parameters())
    rest = [p for p in trained(supernet) if all(p is not other for other in head)]
    return [made[0] if made else torch.optim.SGD(head, lr=0.1), torch.optim.SGD(rest, lr=0.1)]


WAYS = [_new_each_stage, _one_of_all, _split_by_shape, _split_by_side, _head_apart]


@pytest.mark.parametrize("way", WAYS)
def test_an_optimizer_that_holds_the_stage_trains_it(way):
    supernet, optimizers = fresh(), []
    for stage in range(3):
        supernet.train_stage(stage)
        optimizers = way(supernet, optimizers)
        before = adapters(supernet, stage)
        for optimizer in optimizers * 2:
            step(supernet, optimizer)
        assert all(not torch.equal(new, old) for new, old in zip(adapters(supernet, stage), before, strict=True))


def test_optimizers_of_other_models_are_no_ones_business():
    supernet, other = fresh(), fresh()
    optimizer = torch.optim.SGD(trained(other), lr=0.1)
    supernet.train_stage(2)
    step(other, optimizer)
    linear = nn.Linear(2, 2)
    linear(torch.ones(1, 2)).sum().backward()
    torch.optim.SGD(linear.parameters(), lr=0.1).step()
    del supernet


# ---- transformers' plain Trainer --------------------------------------------------------------------------------


def rows(suffix: str) -> Dataset:
    """Twelve rows, with a column that no model takes."""
    batch = inputs()
    labels = [0, 1, 0] if "Classification" in suffix else batch["input_ids"].tolist()
    columns: dict[str, Any] = {key: value.tolist() * 4 for key, value in batch.items()}
    return Dataset.from_dict({**columns, "labels": labels * 4, "text": ["some text"] * 12})


def trainer(supernet: SuperTransformer, suffix: str, folder: Any, **options: Any) -> tf.Trainer:
    args = tf.TrainingArguments(
        str(folder), report_to="none", per_device_train_batch_size=12, disable_tqdm=True, optim="sgd",
        learning_rate=0.1, lr_scheduler_type="constant", max_grad_norm=0, **options,
    )  # fmt: skip
    return tf.Trainer(supernet, args, train_dataset=rows(suffix), eval_dataset=rows(suffix))


@pytest.mark.parametrize(
    ("name", "suffix"),
    [("bert", "ForSequenceClassification"), ("llama-tied", "ForCausalLM"), ("roberta", "ForMaskedLM")],
)
def test_the_plain_trainer_trains_saves_and_resumes(name, suffix, tmp_path):
    by_hand = fresh(name, suffix).eval()
    batch = {key: torch.tensor(rows(suffix)[key]) for key in ("input_ids", "attention_mask", "labels")}
    optimizer = torch.optim.SGD(trained(by_hand), lr=0.1)
    for _ in range(4):
        optimizer.zero_grad()
        by_hand(**batch).loss.backward()
        optimizer.step()
    supernet, resumed = fresh(name, suffix), fresh(name, suffix)
    first = trainer(supernet, suffix, tmp_path, max_steps=4, save_steps=2)
    first.train()
    assert distance(logits(supernet.eval()), logits(by_hand)) < 1e-5
    assert first.evaluate()["eval_loss"] == pytest.approx(by_hand(**batch).loss.item(), rel=1e-5)
    trainer(resumed, suffix, tmp_path, max_steps=4, save_steps=2).train(str(tmp_path / "checkpoint-2"))
    assert torch.equal(logits(resumed.eval()), logits(supernet))
