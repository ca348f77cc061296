"""Fused blocks: parts of a layer whose elastic layers run together with what transformers computes between them.

A family's table says which of its modules are fused blocks (`Family.fused`). Such a module stays what it is, with its
parts by their names, and computes the same; only its forward pass is another.
"""
