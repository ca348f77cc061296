"""`BoundSubnet`: one size of a super-transformer, which any thread may run."""

import functools
import types
from typing import Any

from mlfs.errors import MLFSError
from mlfs.space.subnet import Subnet


class BoundSubnet:
    """Runs one subnet of a super-transformer whenever it is called, whatever is active around it and in any thread.

    Made by `SuperTransformer.bound`. It stands for the Hugging Face model: it is called and generates as that does,
    and whatever else it is asked for is the model's; its methods run under the subnet (`save_pretrained` writes the
    checkpoint of this size). What the model returns itself (`eval()`, `to(device)`) comes back as the bound subnet.
    Nothing is copied: weights, mode and device are those of the super-transformer.

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
        if not isinstance(value, types.MethodType):
            return value

        @functools.wraps(value)
        def method(*args: Any, **kwargs: Any) -> Any:
            with self.supernet.activate(self.subnet):
                result = value(*args, **kwargs)
            return self if result is self.supernet.model else result

        return method

    def __setattr__(self, name: str, value: Any) -> None:
        raise MLFSError(f"a bound subnet holds nothing of its own: set {name} on supernet.model, for all sizes")

    def __repr__(self) -> str:
        return f"BoundSubnet({self.subnet})"
