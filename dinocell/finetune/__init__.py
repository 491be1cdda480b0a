"""Fine-tuning: the distance-map decoder on top of a backbone, and its training."""
