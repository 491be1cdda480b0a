"""Backbones: the vision transformer, its positions, and every checkpoint format it can be loaded from."""
