"""Labelled sets: reading masks, building sets, distance maps and flows."""
