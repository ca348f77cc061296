"""Who else looks at what runs: modes, tracers and transformations of PyTorch's, all of which work at its dispatcher.

A call of the extension does not pass the dispatcher: it is only made where nobody looks (`is_watched`). Operators of
`torch.library` are seen there, but are black boxes to who differentiates or records what they are made of: for those
(`is_transformed`) the formula runs in plain PyTorch.

What is asked here takes 30 ns or less each: it stands before products of some microseconds.
"""

from typing import Any

import torch
from torch.autograd import forward_ad
from torch.nn.modules import module as torch_module

_dispatch_modes = torch._C._len_torch_dispatch_stack
_function_modes = torch._C._len_torch_function_stack
_tracing_state = torch._C._get_tracing_state
_transformations = torch._C._functorch.peek_interpreter_stack


def is_watched() -> bool:
    """Tells whether a mode sees each operator that runs: FlopCounterMode, make_fx, policies of checkpointing, ...

    Always where `is_transformed`. Not to be asked while torch.compile traces, which sees to that itself.
    """
    return bool(_dispatch_modes() or _function_modes() or _is_recorded())


def is_transformed() -> bool:
    """Tells whether what runs is made into something else, which operators of one's own do not outlive.

    That is: recorded by torch.jit.trace or torch.export, to run where mlfs is not; differentiated forwards; or
    transformed by torch.func (vmap, grad, jvp, ...).
    """
    if torch.compiler.is_compiling():
        return torch.compiler.is_exporting()
    return _is_recorded()


def _is_recorded() -> bool:
    return _tracing_state() is not None or _transformations() is not None or forward_ad._current_level >= 0


def sees_all_modules() -> bool:
    """Tells whether hooks watch the calls of all modules there are, as FlopCounterMode's do."""
    return bool(torch_module._has_any_global_hook())


def have_hooks(*modules: Any) -> bool:
    """Tells whether someone watches the calls of a module: they have to be calls then, with what a call gives."""
    for module in modules:  # a loop takes half as long as any(): fused layers ask of a dozen modules
        own = module.__dict__
        if own["_forward_hooks"] or own["_forward_pre_hooks"] or own["_backward_hooks"] or own["_backward_pre_hooks"]:
            return True
    return sees_all_modules()
