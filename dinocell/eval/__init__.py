"""Evaluation and segmentation: windows, watershed, scores, probes, and the pipeline that chains them."""
