"""Who reads a layer's weight to multiply with it, instead of calling the layer.

Such a reader would leave out the low-rank stages without a word, or meet the full width where a smaller size is active.
It is given what the layer computes with. Everybody else who reads `layer.weight` wants the parameter, which libraries
that shard, move, tie or save parameters write to as well.
"""

import warnings
from types import FrameType

READERS = (
    "torch.nn.modules.activation",  # nn.MultiheadAttention reads out_proj
    "torch.nn.modules.transformer",  # nn.TransformerEncoderLayer without gradients: linear1, linear2, norm1, norm2
    # what makes the loss from the head's input and weight: the LM head
    "trl",
    "liger_kernel",
    "cut_cross_entropy",
)

# Who shards, moves, ties, saves or trains parameters, and means them. Others are told once where they read.
KEEPERS = (
    "accelerate", "bitsandbytes", "deepspeed", "lightning", "lightning_fabric", "mlfs", "peft", "pytorch_lightning",
    "safetensors", "torch", "torchao", "transformers",
)  # fmt: skip


def multiplies_itself(reader: FrameType) -> bool:
    """Tells whether the code that runs in a frame is one of `READERS`, or of a module in one."""
    name = reader.f_globals.get("__name__", "")
    return any(name == known or name.startswith(f"{known}.") for known in READERS)


def tell_of_the_parameter(reader: FrameType, kind: str, name: str) -> None:
    """Warns code that is not known to mean the parameter that the layer computes with something else now."""
    if reader.f_globals.get("__name__", "").partition(".")[0] not in KEEPERS:
        warnings.warn(
            f"{kind}.{name} is the parameter, of the full size and without stages, which the layer does not compute "
            f"with now: to multiply with it yourself, take computed_{name}(); own_{name} is the parameter too, without "
            "this warning",
            stacklevel=4,
        )
