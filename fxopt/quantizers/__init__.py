"""How `quantize` works in each of its modes, a file for each, and what these share."""
