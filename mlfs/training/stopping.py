"""Which stop ends a stage, and which one the run.

Each stage is a run of the Trainer: its last step sets `should_training_stop` too. What a callback sets is told from
that by who set it.
"""

import signal
from typing import Any

from transformers import TrainerCallback
from transformers import TrainerControl as _TrainerControl
from transformers.trainer_callback import CallbackHandler, DefaultFlowCallback


class TrainerControl(_TrainerControl):
    """A control that remembers that somebody asked for the training to stop. The Trainer saves it by this name."""

    __slots__ = ("_stop_was_asked",)  # beside the fields: whoever looks through them finds Trainer's

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name == "should_training_stop" and value:
            super().__setattr__("_stop_was_asked", True)


def stop_was_asked(control: _TrainerControl) -> bool:
    """Tells whether anybody has asked for the training to stop since `forget_stop`."""
    # a callback may have put a control of its own in the place of ours
    return getattr(control, "_stop_was_asked", control.should_training_stop)


def forget_stop(control: _TrainerControl, asked: bool = False) -> None:
    """Sets what `stop_was_asked` says."""
    control._stop_was_asked = asked  # type: ignore[attr-defined]


class StageFlow(DefaultFlowCallback):
    """The Trainer's default flow, whose stop at the last step nobody has asked for."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        """Sets what is due after a step; see `DefaultFlowCallback`."""
        asked = stop_was_asked(control)
        control = super().on_step_end(args, state, control, **kwargs)
        forget_stop(control, asked)
        return control


def with_stage_flow(handler: CallbackHandler) -> None:
    """Puts `StageFlow` where the default flow is."""
    callbacks: list[TrainerCallback] = handler.callbacks
    for i, callback in enumerate(callbacks):
        if type(callback) is DefaultFlowCallback:
            callbacks[i] = StageFlow()


def catch_signals_again(callbacks: CallbackHandler) -> None:
    """Sets the handler of SIGTERM anew that `enable_jit_checkpoint` sets for a Trainer once, and that the end of each
    training, which is that of a stage, takes back."""
    for callback in callbacks.callbacks:
        manager = getattr(callback, "jit_manager", None)
        if manager is not None and signal.getsignal(signal.SIGTERM) != manager._sigterm_handler:
            manager.setup_signal_handler()
