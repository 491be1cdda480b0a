"""Segmentation and classification metrics and their files."""
