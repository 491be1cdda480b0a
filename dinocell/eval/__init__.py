"""Evaluation and segmentation: the pipeline, postprocessing, exports, metrics, threshold search and probes."""
