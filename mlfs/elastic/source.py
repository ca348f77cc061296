"""Which modules an elastic layer can be made from: those that compute what their class says, from weights they have."""

from torch import nn
from torch.nn.utils import parametrize, prune
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from mlfs.errors import MLFSError

# What computes a weight anew before each call, as old hooks do, and what makes its last result the weight.
_HOOKS: dict[type, str] = {
    WeightNorm: "torch.nn.utils.remove_weight_norm(module)",
    SpectralNorm: "torch.nn.utils.remove_spectral_norm(module)",
    prune.BasePruningMethod: 'torch.nn.utils.prune.remove(module, "weight")',
}


def why_not_plain(module: nn.Module) -> str | None:
    """Says why the weights of a module are not there as they are computed with, and the way out; None if they are."""
    for name, parameter in module._parameters.items():
        if parameter is not None and nn.parameter.is_lazy(parameter):
            return f"{name} has no size yet: run a batch through the lazy module first"
    if parametrize.is_parametrized(module):
        names = list(module.parametrizations)  # type: ignore[arg-type]
        calls = ", ".join(f'torch.nn.utils.parametrize.remove_parametrizations(module, "{name}")' for name in names)
        return f"{' and '.join(names)} computed by parametrizations: fix what they give with {calls}"
    for hook in module._forward_pre_hooks.values():
        for kind, way_out in _HOOKS.items():
            if isinstance(hook, kind):
                return f"a weight that is computed before each call: fix it with {way_out}"
    return None


def check_source(module: nn.Module, made_for: type[nn.Module] | None = None) -> None:
    """Raises MLFSError, with the way out, unless an elastic layer can stand for a module.

    Args:
        made_for: the class whose forward pass the elastic layer has; None: any.
    """
    kind = type(module).__name__
    if reason := why_not_plain(module):
        raise MLFSError(f"{kind}: {reason}")
    if "forward" in vars(module):
        raise MLFSError(
            f"{kind}: its forward pass was replaced (by accelerate's hooks, say), which an elastic layer would not do: "
            "take the module as its class has it"
        )
    if made_for is not None and type(module).forward is not made_for.forward:
        raise MLFSError(
            f"{kind}: computes something else than {made_for.__name__}, whose place an elastic layer takes: "
            f"give a {made_for.__name__}"
        )


def share_hooks(module: nn.Module, made: nn.Module) -> None:
    """Lets the hooks of a module watch what stands for it; what registering them returned still removes them."""
    for name in (
        "_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks",
        "_forward_pre_hooks_with_kwargs", "_backward_hooks", "_backward_pre_hooks", "_is_full_backward_hook",
    ):  # fmt: skip
        setattr(made, name, getattr(module, name))
