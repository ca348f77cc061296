"""Measures what a size costs, and shows it."""
