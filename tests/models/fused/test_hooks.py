"""Hooks on any module of a model see, and change, what they do on the plain model: fused blocks make way for them."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mlfs import SuperTransformer
from tests.tiny_models import CASES, inputs, logits_of, make

FAMILIES = [(name, case.classes[0]) for name, case in CASES.items()]


def first_tensor(output: Any) -> Tensor | None:
    while isinstance(output, (tuple, list)) and output:
        output = output[0]
    return output if isinstance(output, Tensor) else None


def calls_of(model: nn.Module, watched: str | None, batch: dict[str, Tensor]) -> dict[str, list[Tensor | None]]:
    """Runs the model with a hook on one module, or on all (None); gives each module's outputs, call by call."""
    seen: dict[str, list[Tensor | None]] = {}
    handles = []
    for name, module in model.named_modules():
        if name and watched in (None, name):

            def hook(module: nn.Module, args: Any, output: Any, name: str = name) -> None:
                seen.setdefault(name, []).append(first_tensor(output))

            handles.append(module.register_forward_hook(hook))
    model(**batch)
    for handle in handles:
        handle.remove()
    return seen


def assert_same_calls(found: dict[str, list[Tensor | None]], expected: dict[str, list[Tensor | None]]) -> None:
    for name, outputs in expected.items():
        assert len(found.get(name, [])) == len(outputs), name
        for a, b in zip(found[name], outputs, strict=True):
            assert (a is None) == (b is None), name
            if a is not None and b is not None and b.is_floating_point():
                torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.parametrize("gradients", [False, True], ids=["without gradients", "with gradients"])
@pytest.mark.parametrize(("family", "suffix"), FAMILIES)
def test_a_hook_sees_what_it_sees_on_the_plain_model(family: str, suffix: str, gradients: bool) -> None:
    torch.manual_seed(0)
    model, batch = make(family, suffix), inputs("left")
    plain = calls_of(model, None, batch)
    supernet = SuperTransformer(model, rank=2).eval()
    first_layer = f"{supernet.layers_name}.0."
    with torch.set_grad_enabled(gradients):
        assert_same_calls(calls_of(model, None, batch), plain)
        for name in plain:
            if first_layer in f"{name}.":  # alone, so that all else runs fused
                assert_same_calls(calls_of(model, name, batch), {name: plain[name]})


@pytest.mark.parametrize(("family", "suffix"), FAMILIES)
def test_what_a_hook_returns_acts_in_its_place(family: str, suffix: str) -> None:
    torch.manual_seed(0)
    model, batch = make(family, suffix), inputs("left")
    layers = next(m for m in model.modules() if isinstance(m, nn.ModuleList))

    def enlarge(module: nn.Module, args: Any, output: Any) -> Any:
        return output * 1.5 if isinstance(output, Tensor) else None

    for module in layers[0].modules():
        if not list(module.children()):
            module.register_forward_hook(enlarge)
    expected = logits_of(model(**batch))
    supernet = SuperTransformer(model, rank=2).eval()
    for gradients in (False, True):
        with torch.set_grad_enabled(gradients):
            torch.testing.assert_close(logits_of(supernet(**batch)), expected, rtol=1e-3, atol=1e-4)
