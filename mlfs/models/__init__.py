"""All that knows transformers' modelling code."""
