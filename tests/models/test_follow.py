"""A module that follows the active subnet is the module it was, but for what the subnet gives it."""

import pickle

import pytest
import torch
from torch import nn

from mlfs import MLFSError, SearchSpace
from mlfs.elastic.scope import Scope
from mlfs.models.follow import FollowsSubnet, follow, scope_of, settle
from mlfs.space.dimensions import AxisSize, Dimensions
from tests.supernets import elastic

DIMS = Dimensions(hidden=8, heads=4, kv_heads=4, head_dim=2, ffn=16, layers=2)
SPACE = SearchSpace((8, 4), (4, 2), (16, 8), ((0, 1), (0,)))


class Part(nn.Module):
    """A module of a model, with a number that a subnet changes."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = 4

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Adds its number."""
        return x + self.heads


@pytest.fixture
def scope() -> Scope:
    return Scope(DIMS.layer_sizes(SPACE.max))


SMALL = DIMS.layer_sizes(SPACE.min)  # without layer 1


def tripled(self: Part, x: torch.Tensor) -> torch.Tensor:
    return 3 * x + self.heads


def followed(scope: Scope, layer: int, **options) -> Part:
    part = Part()
    follow(part, scope, {"heads": AxisSize("heads", 1, 0)}, layer=layer, **options)
    return part


def test_one_swap_gives_attributes_a_forward_pass_and_skipping(scope):
    part, x = followed(scope, layer=1, forward=tripled), torch.ones(2)
    assert type(part).__mro__[1:3] == (FollowsSubnet, Part)
    assert part(x).tolist() == [7.0, 7.0]
    with scope.activate(SMALL):
        assert part.heads == 2
        assert part(x) is x


def test_a_layer_that_is_kept_runs_with_the_subnets_attributes(scope):
    part = followed(scope, layer=0)
    with scope.activate(SMALL):
        assert part(torch.ones(2)).tolist() == [3.0, 3.0]
    assert part(torch.ones(2)).tolist() == [5.0, 5.0]


def test_to_everyone_else_it_is_what_it_was(scope):
    part = followed(scope, layer=0, forward=tripled)
    assert isinstance(part, Part)
    assert (type(part).__name__, type(part).__module__) == (Part.__name__, Part.__module__)
    assert type(part).__doc__ == Part.__doc__ and type(part).forward.__doc__ == Part.forward.__doc__


def test_modules_that_need_the_same_share_a_class(scope):
    assert type(followed(scope, layer=0)) is type(followed(scope, layer=1))
    assert type(followed(scope, layer=0)) is not type(followed(scope, layer=0, forward=tripled))


@pytest.mark.parametrize("forward", [None, tripled])
def test_settled_it_has_its_class_and_the_sizes_asked_for(scope, forward):
    part = followed(scope, layer=0, forward=forward)
    settle(part, SMALL)
    assert type(part) is Part
    assert vars(part)["heads"] == 2
    assert part(torch.ones(2)).tolist() == [3.0, 3.0]
    assert b"follow" not in pickle.dumps(vars(part))


def test_settling_a_module_that_follows_nothing_changes_nothing():
    part = Part()
    before = dict(vars(part))
    settle(part, SMALL)
    assert type(part) is Part and vars(part) == before


def test_a_module_follows_once(scope):
    part = followed(scope, layer=0)
    with pytest.raises(MLFSError, match="this Part follows a subnet already"):
        follow(part, scope, {})


def test_the_scope_is_that_which_it_follows(scope):
    assert scope_of(followed(scope, layer=0)) is scope
    with pytest.raises(MLFSError, match="this Part follows no subnet"):
        scope_of(Part())


@pytest.mark.parametrize(("name", "suffix"), [("bert", "ForMaskedLM"), ("gpt2", "LMHeadModel")])
def test_in_a_model_no_class_is_swapped_twice(name, suffix):
    supernet = elastic(name, suffix)
    following = [module for module in supernet.modules() if isinstance(module, FollowsSubnet)]
    assert len(following) > supernet.dimensions.layers
    for module in following:
        made = [kind for kind in type(module).__mro__ if issubclass(kind, FollowsSubnet)]
        assert made == [type(module), FollowsSubnet]
