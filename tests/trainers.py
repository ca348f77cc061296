"""Trainers of the small models in tests/tiny_models.py, on data made up here."""

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset

from mlfs import MLFSArguments, MLFSTrainer, SearchSpace, SuperTransformer
from tests.tiny_models import VOCABULARY, make

SPACE = SearchSpace((48, 32, 24), (6, 4, 2), (40, 20), ((0, 1, 2, 3), (1, 3)))


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
        "save_steps": 3, "order_batches": 3, "projection_size": 8, "rank": 2, "teacher": "maxnet",
        "subnet_rate_factor": 1.0, "warmup_steps": 0, "train_embeddings": False,
    }  # fmt: skip
    extra = {key: options.pop(key) for key in ("callbacks", "train_dataset", "eval_dataset") if key in options}
    supernet = options.pop("supernet", None) or SuperTransformer(make(name, suffix), SPACE, rank=2)
    data = {"train_dataset": rows(32, causal=causal), "eval_dataset": rows(16, 1, causal), **extra}
    return MLFSTrainer(supernet, MLFSArguments(**{**settings, **options}), **data)


def own(supernet: SuperTransformer) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in supernet.own_parameters().items()}


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


class Stopped(Exception):
    """What breaks a run off."""


def cut_off(t: MLFSTrainer, stage: int, at: int) -> None:
    """Trains until a step of a stage, and breaks off there."""
    step = t.training_step

    def stops(*args: Any, **kwargs: Any) -> Any:
        if (t.stage, t.state.global_step) == (stage, at):
            raise Stopped
        return step(*args, **kwargs)

    t.training_step = stops
    with pytest.raises(Stopped):
        t.train()
    t.training_step = step


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
