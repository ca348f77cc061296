"""Checkpointing of one's own around a super-transformer, whose forward pass it runs again in the backward pass."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mlfs import MLFSError, SuperTransformer
from tests.tiny_models import make

FAMILIES = pytest.mark.parametrize("family", ["bert-ForSequenceClassification", "llama-ForCausalLM"])
REENTRANT = pytest.mark.parametrize("reentrant", [True, False])
Run = Callable[[Tensor], Tensor]


def trained(family: str) -> SuperTransformer:
    torch.manual_seed(0)
    supernet = SuperTransformer(make(*family.split("-")), rank=2).eval()
    for module in supernet.elastic():
        for b in getattr(module, "lora_B", ()):
            nn.init.normal_(b, std=0.1)
    return supernet


def gradients(supernet: SuperTransformer, run: Run, inside: bool) -> list[Tensor | None]:
    """Gradients of what trains at the smallest size; the backward pass is in the block of `activate`, or after it."""
    supernet.zero_grad(set_to_none=True)
    subnet = supernet.space.min
    x = torch.randn(2, 7, subnet.hidden, generator=torch.Generator().manual_seed(1)).requires_grad_()
    with supernet.activate(subnet):
        loss = run(x).square().sum()
        if inside:
            loss.backward()
    if not inside:
        loss.backward()
    return [None if p.grad is None else p.grad.clone() for p in (x, *supernet.parameters())]


def assert_same(found: list[Tensor | None], expected: list[Tensor | None]) -> None:
    assert sum(gradient is not None for gradient in expected) > 2
    for a, b in zip(found, expected, strict=True):
        assert (a is None) == (b is None)
        if a is not None and b is not None:
            torch.testing.assert_close(a, b)


@FAMILIES
@REENTRANT
def test_it_is_right_within_the_block_and_where_nothing_is_active(family: str, reentrant: bool) -> None:
    supernet = trained(family)

    def whole(x: Tensor) -> Tensor:
        return supernet(inputs_embeds=x).logits

    def checkpointed(x: Tensor) -> Tensor:
        return checkpoint(whole, x, use_reentrant=reentrant)

    expected = of_whole(supernet, whole)
    assert_same(of_whole(supernet, checkpointed), expected)
    expected_small = gradients(supernet, whole, inside=True)
    assert_same(gradients(supernet, checkpointed, inside=True), expected_small)


def of_whole(supernet: SuperTransformer, run: Run) -> list[Tensor | None]:
    """Gradients of the whole model, which nothing activates."""
    supernet.zero_grad(set_to_none=True)
    x = torch.randn(2, 7, supernet.space.max.hidden, generator=torch.Generator().manual_seed(1)).requires_grad_()
    run(x).square().sum().backward()
    return [None if p.grad is None else p.grad.clone() for p in (x, *supernet.parameters())]


@FAMILIES
@REENTRANT
@pytest.mark.parametrize("what", ["super-transformer", "model"])
def test_outside_of_the_block_it_is_refused_in_one_line(family: str, reentrant: bool, what: str) -> None:
    supernet = trained(family)
    model = supernet if what == "super-transformer" else supernet.model

    def checkpointed(x: Tensor) -> Tensor:
        return checkpoint(lambda x: model(inputs_embeds=x).logits, x, use_reentrant=reentrant)

    with pytest.raises(MLFSError, match=r"backward pass inside the block, or .*bound\(subnet\)") as raised:
        gradients(supernet, checkpointed, inside=False)
    assert "\n" not in str(raised.value)
    gradients(supernet, checkpointed, inside=True)


@FAMILIES
@REENTRANT
@pytest.mark.parametrize("inside", [True, False])
def test_a_bound_subnet_is_right_wherever_the_backward_pass_is(family: str, reentrant: bool, inside: bool) -> None:
    supernet = trained(family)
    small = supernet.bound(supernet.space.min)

    def run(x: Tensor) -> Tensor:
        return small(inputs_embeds=x).logits

    expected = gradients(supernet, run, inside)
    assert_same(gradients(supernet, lambda x: checkpoint(run, x, use_reentrant=reentrant), inside), expected)


@FAMILIES
def test_the_models_own_checkpointing_is_right_wherever_the_backward_pass_is(family: str) -> None:
    supernet = trained(family)

    def run(x: Tensor) -> Tensor:
        return supernet(inputs_embeds=x).logits

    expected = gradients(supernet, run, inside=True)
    supernet.train()
    for module in supernet.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    supernet.model.gradient_checkpointing_enable()
    assert_same(gradients(supernet, run, inside=False), expected)
