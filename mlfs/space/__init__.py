"""The values that say what runs: a subnet, the sizes on offer, and what a subnet means for each layer."""
