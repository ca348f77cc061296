"""Costs of a size: latency leaves the model as it was, and bytes are those of the checkpoint."""

import os

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from mlfs.report.cost import latency, size_on_disk
from tests.supernets import elastic, subnets_of


class Counting(nn.Linear):
    """Notes in which mode it runs, and whether gradients are recorded."""

    def __init__(self) -> None:
        super().__init__(2, 2)
        self.seen: list[tuple[bool, bool]] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen.append((self.training, torch.is_grad_enabled()))
        return super().forward(x)


@pytest.mark.parametrize("training", [True, False])
def test_latency_runs_the_model_in_evaluation_without_gradients_and_restores_its_mode(training):
    model = Counting().train(training)
    assert latency(model, {"x": torch.ones(1, 2)}, repeats=4) > 0
    assert model.seen == [(False, False)] * 5  # one of them warms up
    assert model.training is training


def test_latency_restores_the_mode_also_when_the_model_fails():
    model = Counting()
    with pytest.raises(RuntimeError):
        latency(model, {"x": torch.ones(1, 3)})
    assert model.training


def test_latency_is_the_median_of_what_follows_the_warm_up(monkeypatch):
    ends = iter([0, 90, 100, 103, 200, 201, 300, 302])  # seconds: 90 to warm up, then 3, 1 and 2
    monkeypatch.setattr("mlfs.report.cost.time.perf_counter", lambda: next(ends))
    assert latency(Counting(), {"x": torch.ones(1, 2)}, repeats=3) == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_size_on_disk_is_that_of_the_exported_tensors(dtype, tmp_path):
    supernet = elastic("bert", "ForSequenceClassification", dtype)
    for name in ("max", "uniform"):
        subnet = subnets_of("bert")[name]
        supernet.extract(subnet).save_pretrained(tmp_path / name)
        path = tmp_path / name / "model.safetensors"
        expected = sum(tensor.nbytes for tensor in load_file(path).values())
        assert size_on_disk(supernet, subnet) == expected
        assert 0 < os.path.getsize(path) - expected < 20_000  # the file's header
