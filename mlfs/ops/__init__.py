"""Operators of mlfs: one file each, with the formula, the plain PyTorch reference and its registration."""

from mlfs.ops.distill import divergence, feature_distance
from mlfs.ops.flops import COUNTED  # noqa: F401  (its file registers how many operations each operator takes)
from mlfs.ops.head_loss import head_loss, head_loss_reference
from mlfs.ops.norm import layer_norm, rms_norm
from mlfs.ops.rotary import rotary, rotary_reference
from mlfs.ops.sliced_linear import sliced_linear, sliced_linear_reference

__all__ = [
    "divergence",
    "feature_distance",
    "head_loss",
    "head_loss_reference",
    "layer_norm",
    "rms_norm",
    "rotary",
    "rotary_reference",
    "sliced_linear",
    "sliced_linear_reference",
]
