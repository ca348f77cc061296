"""A size leaves the house: formats that load without mlfs."""
