"""What a size costs, and how that is shown."""
