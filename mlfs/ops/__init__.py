"""Operators of mlfs: one file each, with the formula, the plain PyTorch reference and its registration."""

from mlfs.ops.distill import divergence, feature_distance
from mlfs.ops.norm import layer_norm, rms_norm
from mlfs.ops.sliced_linear import sliced_linear, sliced_linear_reference

__all__ = ["divergence", "feature_distance", "layer_norm", "rms_norm", "sliced_linear", "sliced_linear_reference"]
