"""Who reads a layer's weight to multiply with it, instead of calling the layer.

Such a reader would leave out the low-rank stages without a word, or meet the full width where a smaller size is active.
It is given what the layer computes with. Everybody else who reads `layer.weight` wants the parameter, which libraries
that shard, move, tie or save parameters write to as well.
"""

from types import FrameType

READERS = (
    "torch.nn.modules.activation",  # nn.MultiheadAttention reads out_proj
    "torch.nn.modules.transformer",  # nn.TransformerEncoderLayer without gradients: linear1, linear2, norm1, norm2
    # what makes the loss from the head's input and weight: the LM head
    "trl",
    "liger_kernel",
    "cut_cross_entropy",
)


def multiplies_itself(reader: FrameType) -> bool:
    """Tells whether the code that runs in a frame is one of `READERS`, or of a module in one."""
    name = reader.f_globals.get("__name__", "")
    return any(name == known or name.startswith(f"{known}.") for known in READERS)
