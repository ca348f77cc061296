"""Parts of a layer that run fused: elastic layers, and what transformers computes between them in separate passes."""
