"""What a subnet learns from maxnet's hidden states: which layer is compared with which."""

from typing import Any

import pytest
import torch

from mlfs import MLFSError
from mlfs.training.distillation import HiddenStateDistance, detached

HIDDEN, LAYERS = 8, 3


def outputs(width: int, layers: int, seed: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    return {"hidden_states": tuple(torch.randn(2, 4, width, generator=generator) for _ in range(layers + 1))}


@pytest.mark.parametrize("final_norm", [False, True])
@pytest.mark.parametrize("layers", [(0, 2), (0, 1)])
def test_each_layer_of_a_subnet_is_compared_with_the_maxnet_layer_it_is(layers, final_norm):
    """Save the last of one that ends early, where the model reports a normalised state there."""
    student, teacher, betas = outputs(6, 2, 0), outputs(HIDDEN, LAYERS, 1), [0.1, 0.2, 0.4]
    distance = HiddenStateDistance(HIDDEN, LAYERS, betas, 4, final_norm=final_norm)
    found = distance(layers, student, teacher)
    expected = torch.zeros(())
    for i, layer in enumerate(layers):
        if final_norm and layer == 1:
            continue
        projection = distance.projections[layer]
        target = teacher["hidden_states"][layer + 1] @ projection.T
        projected = student["hidden_states"][i + 1] @ projection[:, :6].T
        expected += betas[layer] * (projected - target).pow(2).sum() / target.pow(2).sum()
    torch.testing.assert_close(found, expected)


def test_padding_does_not_count():
    student, teacher = outputs(6, 3, 0), outputs(HIDDEN, LAYERS, 1)
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    distance, kept = HiddenStateDistance(HIDDEN, LAYERS, [0.1], 4), (0, 1, 2)
    before = distance(kept, student, teacher, mask)
    for state in student["hidden_states"]:
        state[1, 2:] += 1
    assert torch.equal(distance(kept, student, teacher, mask), before)
    assert not torch.equal(distance(kept, student, teacher), before)


def test_projections_are_orthonormal_and_drawn_from_the_seed():
    first, again, other = (HiddenStateDistance(HIDDEN, LAYERS, [0.1], 4, seed=seed) for seed in (1, 1, 2))
    for a, b, c in zip(first.projections, again.projections, other.projections, strict=True):
        torch.testing.assert_close(a @ a.T, torch.eye(4))
        assert torch.equal(a, b) and not torch.equal(a, c)
        assert not a.requires_grad
    assert all(p.requires_grad for p in HiddenStateDistance(HIDDEN, LAYERS, [0.1], 4, learned=True).parameters())


def test_as_many_weights_as_layers_or_one():
    assert HiddenStateDistance(HIDDEN, LAYERS, [0.1]).betas == (0.1, 0.1, 0.1)
    assert not HiddenStateDistance(HIDDEN, LAYERS, [0.0]).is_used
    assert HiddenStateDistance(HIDDEN, LAYERS, [0.0, 0.0, 1.0]).is_used
    with pytest.raises(MLFSError, match="2 values: expected one, or one for each of 3 layers"):
        HiddenStateDistance(HIDDEN, LAYERS, [0.1, 0.2])


def test_a_teachers_outputs_have_no_graph_and_no_cache():
    x = torch.ones(2, requires_grad=True)
    found = detached({"logits": x * 2, "hidden_states": (x * 3, x * 4), "past_key_values": object(), "other": None})
    assert found.keys() == {"logits", "hidden_states", "other"}
    assert not any(t.requires_grad for t in (found["logits"], *found["hidden_states"]))
