"""Parameters are counted as the extracted model has them."""

import re

import pytest
import torch

from mlfs.supernet.count import count_in_layers
from tests.supernets import elastic, parameters_of, subnets_of
from tests.tiny_models import all_models, inputs, logits_of, make

every_model = pytest.mark.parametrize(("name", "suffix"), all_models())


@every_model
def test_parameters_are_counted_as_the_extracted_model_has_them(name, suffix):
    supernet = elastic(name, suffix)
    for subnet in subnets_of(name).values():
        assert supernet.count_parameters(subnet) == parameters_of(supernet.extract(subnet))
    assert supernet.count_parameters(supernet.space.max) == parameters_of(make(name, suffix))


@every_model
def test_the_layers_alone_are_counted_as_the_extracted_model_has_them(name, suffix):
    supernet = elastic(name, suffix)
    for subnet in subnets_of(name).values():
        layers = supernet.extract(subnet).get_submodule(supernet.layers_name)
        found = count_in_layers(supernet.model, supernet.layers_name, supernet.layer_sizes(subnet))
        assert found == sum(p.numel() for p in layers.parameters())


@every_model
def test_trainable_numbers_are_those_a_step_of_the_subnet_can_change(name, suffix):
    supernet = elastic(name, suffix)
    for stage, head, norms in ((0, True, False), (1, False, False), (2, True, True), (None, True, False)):
        supernet.train_stage(stage, head=head, norms=norms)
        trained = {key: p for key, p in supernet.model.named_parameters() if p.requires_grad}
        for subnet in (subnets_of(name)[key] for key in ("max", "min", "per layer, without layer 0")):
            # From the shapes of the extracted model, whose layers are numbered anew.
            expected = 0
            for key, parameter in supernet.extract(subnet).named_parameters():
                layer = re.escape(supernet.layers_name)
                place = re.sub(rf"^({layer}\.)(\d+)\.", lambda m, s=subnet: f"{m[1]}{s.layers[int(m[2])]}.", key)
                expected += parameter.numel() if place in trained else 0
                if place.endswith(".weight") and f"{place.removesuffix('weight')}lora_A.{stage}" in trained:
                    expected += 4 * sum(parameter.shape)
            assert supernet.count_trainable(subnet) == expected
            with supernet.activate(subnet):
                logits = logits_of(supernet(**inputs()))
            if logits.requires_grad:
                gradients = torch.autograd.grad(logits.square().sum(), trained.values(), allow_unused=True)
                assert 0 < sum(int((g != 0).sum()) for g in gradients if g is not None) <= expected
