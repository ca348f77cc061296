"""Classes made at run time: of the Hugging Face model inside a super-transformer, and of the super-transformer itself.

As with the modules in it (`mlfs.models.follow`), the model stays what it was to everyone else, and a pickle says what
its class is made of.
"""

import functools
import inspect
from typing import Any

import torch
from torch.nn.modules.module import register_module_module_registration_hook
from transformers import PreTrainedModel

from mlfs.elastic.guard import Guarded, why_no_peft
from mlfs.errors import MLFSError
from mlfs.supernet.parallel import share_records
from mlfs.supernet.record import NAME, Record
from mlfs.supernet.recorded import show_record


class ElasticModel(Guarded):
    """The Hugging Face model inside a super-transformer: what is asked of it means the active subnet, or is refused.

    Every class that `hold` makes has this one among its bases.
    """

    _own_class: type[PreTrainedModel]

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        # `type(model)(config)` and `type(model).from_pretrained` are how others make a plain model of the same kind
        return cls._own_class(*args, **kwargs)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.compiler.is_compiling():
            self._record().refresh()
            vars(self)["_supernet"]._scope.check_known()
        return super().__call__(*args, **kwargs)  # type: ignore[misc]

    def save_pretrained(self, save_directory: Any, *args: Any, state_dict: Any = None, **kwargs: Any) -> None:
        """Saves the active subnet, outside of `activate` the whole model, as a plain transformers checkpoint.

        Arguments: as `PreTrainedModel.save_pretrained`. A `state_dict` has to be this model's own.

        Raises:
            MLFSError: no configuration can state the active subnet's sizes, rows of the batch have sizes of their own,
                or another `state_dict`.
        """
        self._plain(state_dict).save_pretrained(save_directory, *args, **kwargs)

    def push_to_hub(self, *args: Any, **kwargs: Any) -> Any:
        """Uploads what `save_pretrained` would save; arguments as `PreTrainedModel.push_to_hub`, errors as there."""
        return self._plain(None).push_to_hub(*args, **kwargs)

    def _plain(self, state_dict: Any) -> PreTrainedModel:
        """Makes the plain model of the active subnet, for saving."""
        supernet: Any = vars(self)["_supernet"]
        self._record().look()
        if supernet.has_row_sizes:
            raise MLFSError("rows have sizes of their own here, and a checkpoint one: save inside activate(subnet)")
        if state_dict is not None:
            own = supernet.model.state_dict()
            if own.keys() != state_dict.keys() or not all(_same(own[key], state_dict[key]) for key in own):
                raise MLFSError(
                    "save_pretrained(state_dict=...) is not this model's own state: load it first "
                    "(load_state_dict), then save without it"
                )
        return supernet.extract(supernet.active)

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        """Returns the input embeddings, where they have that many tokens already.

        Raises:
            MLFSError: another number of tokens.
        """
        embeddings: Any = self.get_input_embeddings()  # type: ignore[operator]
        have = embeddings.weight.shape[0]
        wanted = have if new_num_tokens is None else new_num_tokens
        if wanted != have or have % (pad_to_multiple_of or 1):
            self.set_input_embeddings()
        return embeddings

    def set_input_embeddings(self, *_: Any) -> None:
        """Raises MLFSError: the embeddings are elastic, and stay."""
        raise MLFSError(
            "the embeddings of a super-transformer cannot be resized or replaced: add tokens and resize before "
            "SuperTransformer(model), which keeps the new rows with the run"
        )

    set_output_embeddings = set_input_embeddings

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        """Starts continuous batching of the whole model; `generate_batch` and paged caches go through it.

        Raises:
            MLFSError: a smaller size is active. A thread of transformers' own runs the model, where it would not be.
        """
        supernet: Any = vars(self)["_supernet"]
        if supernet.has_row_sizes or supernet.active != supernet.space.max:
            raise MLFSError(
                "continuous batching runs in a thread of its own, where the whole model is active: batch the requests "
                "of the extracted model, supernet.extract(subnet).generate_batch(...)"
            )
        return super().init_continuous_batching(*args, **kwargs)  # type: ignore[misc]

    def add_adapter(self, *args: Any, **kwargs: Any) -> None:
        """Raises MLFSError: the stages are the adapters."""
        raise MLFSError(why_no_peft())

    load_adapter = add_adapter

    def state_dict(self, *args: Any, prefix: str = "", **kwargs: Any) -> Any:
        """Collects the state as a plain model does, but a tied tensor once, under its first name.

        safetensors, by which a Trainer saves what is no PreTrainedModel, takes no tensor twice.
        """
        state = super().state_dict(*args, prefix=prefix, **kwargs)  # type: ignore[misc]
        for name, first in self._record().ties.items():
            if self._are_tied(name, first):
                state.pop(prefix + name, None)
        return state

    def _are_tied(self, name: str, first: str) -> bool:
        try:
            return self.get_parameter(name) is self.get_parameter(first)
        except AttributeError:  # a wrapper, such as FSDP's, stands between
            return False

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: Any) -> None:
        self._record().check(state_dict, prefix)
        self._record().expect(state_dict, prefix)
        vars(self)["_supernet"]._scope.begin_load(args[-1])
        for name, first in self._record().ties.items():
            if prefix + first in state_dict:
                state_dict.setdefault(prefix + name, state_dict[prefix + first])
        super()._load_from_state_dict(state_dict, prefix, *args)  # type: ignore[misc]

    def _record(self) -> Record:
        return self._modules[NAME]  # type: ignore[return-value]

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return _new_held, (self._own_class,), vars(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[misc]
        show_record(vars(self)["_supernet"])


def hold(model: PreTrainedModel, supernet: Any) -> None:
    """Makes `model` the one inside of `supernet`: gives it its class, and its record."""
    vars(model)["_supernet"] = supernet
    model.add_module(NAME, Record(supernet))
    own_class: Any = type(model)
    model.__class__ = _held_class(own_class)
    show_record(supernet)
    # DistributedDataParallel would send the record with every forward pass; it gets it once (mlfs.supernet.parallel)
    ignored = [f"{NAME}.{key}" for key in model._modules[NAME]._buffers]  # type: ignore[union-attr]
    vars(model)["_ddp_params_and_buffers_to_ignore"] = ignored
    vars(supernet)["_ddp_params_and_buffers_to_ignore"] = [f"model.{key}" for key in ignored]


def leave_out_of_copies(model: PreTrainedModel) -> dict[int, Any]:
    """Gives what a deep copy of `model` puts in the place of what only a super-transformer's model has."""
    return {id(vars(model)["_supernet"]): None, id(model._modules[NAME]): None}


def release(copy: PreTrainedModel) -> None:
    """Undoes `hold` on a copy that was made with `leave_out_of_copies`."""
    copy.__class__ = copy._own_class  # type: ignore[assignment]
    del copy._modules[NAME]
    for name in ("_supernet", "_ddp_params_and_buffers_to_ignore"):
        vars(copy).pop(name, None)


def show_signature(supernet: Any) -> None:
    """Gives `supernet.forward` the signature of the model's, by which a Trainer chooses the columns of its data."""
    own_class: Any = type(supernet)
    supernet.__class__ = _signed_class(own_class, type(supernet.model)._own_class)


class Signed(Guarded):
    """The mark of a super-transformer's class whose `forward` has the signature of its model's."""

    _made_of: tuple[type, type[PreTrainedModel]]

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return _new_signed, self._made_of, vars(self)


@functools.cache
def _held_class(own_class: Any) -> Any:
    return type(own_class.__name__, (ElasticModel, own_class), _namespace(own_class) | {"_own_class": own_class})


@functools.cache
def _signed_class(own_class: Any, model_class: Any) -> Any:
    own_forward: Any = own_class.forward  # type: ignore[attr-defined]

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return own_forward(self, *args, **kwargs)

    forward.__doc__, forward.__module__ = own_forward.__doc__, own_forward.__module__
    forward.__signature__ = inspect.signature(model_class.forward)  # type: ignore[attr-defined]
    namespace = _namespace(own_class) | {"forward": forward, "_made_of": (own_class, model_class)}
    return type(own_class.__name__, (Signed, own_class), namespace)


def _namespace(own_class: type) -> dict[str, Any]:
    return {
        "__module__": own_class.__module__,
        "__qualname__": own_class.__qualname__,
        "__doc__": own_class.__doc__,
    }


def _new_held(own_class: Any) -> Any:
    """Makes the model inside a super-transformer, as yet without its state: the first half of reading a pickle."""
    return object.__new__(_held_class(own_class))


def _new_signed(own_class: Any, model_class: Any) -> Any:
    """Makes a super-transformer, as yet without its state: the first half of reading a pickle."""
    return object.__new__(_signed_class(own_class, model_class))


def _same(ours: torch.Tensor, theirs: Any) -> bool:
    """Whether a tensor of a state dict is the model's own, or equal to it."""
    if not isinstance(theirs, torch.Tensor) or ours.shape != theirs.shape:
        return False
    return ours.data_ptr() == theirs.data_ptr() or torch.equal(ours, theirs.to(ours.device, ours.dtype))


register_module_module_registration_hook(share_records)
