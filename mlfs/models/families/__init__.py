"""Model families as data: a file for each kin of them."""
