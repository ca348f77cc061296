"""Writes a size in formats that load without mlfs."""
