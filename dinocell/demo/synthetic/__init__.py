"""Generated multi-channel fields of cells, with labels."""
