"""Evaluation of features: kNN, linear probes, channel consistency, profiles."""
