"""Fused feed-forward blocks compute what the model's own do."""

import pytest
import torch

from tests.models.fused.models import run, suffix_of
from tests.supernets import distance, elastic, subnets_of
from tests.tiny_models import CASES


@pytest.mark.parametrize(("name", "field", "value"), [("bert", "hidden_act", "relu"), ("llama", "hidden_act", "gelu")])
def test_an_activation_no_kernel_knows_runs_as_it_is(name, field, value, monkeypatch, unfused):
    config = CASES[name].config
    monkeypatch.setattr(type(CASES[name]), "config", property(lambda self: lambda: changed(config())), raising=False)

    def changed(made):
        setattr(made, field, value)
        return made

    subnet = subnets_of(name)["uniform"]
    fused, plain = (f(name, suffix_of(name), dtype=torch.float64) for f in (elastic, unfused))
    assert getattr(fused.config, field) == value
    assert distance(run(fused, subnet)[0], run(plain, subnet)[0]) < 1e-12
