"""`BoundSubnet`: one size of a super-transformer, which any thread may run."""

import functools
import types
from collections.abc import Iterator
from typing import Any

from torch import nn

from mlfs.errors import MLFSError
from mlfs.space.subnet import Subnet


class BoundSubnet:
    """Runs one subnet of a super-transformer whenever it is called, whatever is active around it and in any thread.

    Made by `SuperTransformer.bound`. It stands for the Hugging Face model: it is called and generates as that does,
    and whatever else it is asked for is the model's; its methods run under the subnet (`save_pretrained` writes the
    checkpoint of this size), and so do its modules (`bound.bert(...)`, `bound.model.layers[0]`). What the model returns
    itself (`eval()`, `to(device)`) comes back as the bound subnet. Nothing is copied: weights, mode, device,
    configuration and state are those of the super-transformer.

    Attributes:
        supernet: the super-transformer.
        subnet: what runs.
    """

    def __init__(self, supernet: Any, subnet: Subnet) -> None:
        supernet.layer_sizes(subnet)  # refused here rather than where it runs
        self.__dict__.update(supernet=supernet, subnet=subnet)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the model's forward pass under the subnet; takes and returns what the model does."""
        with self.supernet.activate(self.subnet):
            return self.supernet(*args, **kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Generates under the subnet; takes and returns what the model's `generate` does."""
        with self.supernet.activate(self.subnet):
            return self.supernet.model.generate(*args, **kwargs)

    def extract(self) -> Any:
        """Makes a plain transformers model of the subnet; see `SuperTransformer.extract`."""
        return self.supernet.extract(self.subnet)

    def __getattr__(self, name: str) -> Any:
        if name in ("supernet", "subnet"):  # not there yet: a copy or a pickle is being read
            raise AttributeError(name)
        with self.supernet.activate(self.subnet):
            value = getattr(self.supernet.model, name)
        return _bound(self, value)

    def __setattr__(self, name: str, value: Any) -> None:
        raise MLFSError(f"a bound subnet holds nothing of its own: set {name} on supernet.model, for all sizes")

    def __repr__(self) -> str:
        return f"BoundSubnet({self.subnet})"


class BoundPart:
    """Runs a module of the model under a bound subnet; whatever else it is asked for is the module's."""

    def __init__(self, bound: BoundSubnet, module: nn.Module) -> None:
        self.__dict__.update(bound=bound, module=module)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the module's forward pass under the subnet."""
        with self.bound.supernet.activate(self.bound.subnet):
            return self.module(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name in ("bound", "module"):
            raise AttributeError(name)
        with self.bound.supernet.activate(self.bound.subnet):
            value = getattr(self.module, name)
        return _bound(self.bound, value)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.bound, name, value)

    def __getitem__(self, place: Any) -> Any:
        return _bound(self.bound, self.module[place])  # type: ignore[index]

    def __iter__(self) -> Iterator[Any]:
        return (_bound(self.bound, part) for part in self.module)  # type: ignore[attr-defined]

    def __len__(self) -> int:
        return len(self.module)  # type: ignore[arg-type]

    def __bool__(self) -> bool:
        return True  # whatever its length

    def __repr__(self) -> str:
        return f"BoundPart({self.bound.subnet}, {type(self.module).__name__})"


def _bound(bound: BoundSubnet, value: Any) -> Any:
    """Binds what can run: modules and their methods; anything else as it is."""
    if value is bound.supernet.model:
        return bound
    if isinstance(value, nn.Module):
        return BoundPart(bound, value)
    if not isinstance(value, types.MethodType):
        return value

    @functools.wraps(value)
    def method(*args: Any, **kwargs: Any) -> Any:
        with bound.supernet.activate(bound.subnet):
            return _bound(bound, value(*args, **kwargs))

    return method
