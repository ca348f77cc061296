"""The stages of the method, as a transformers Trainer."""
