"""Self-supervised pretraining: views, losses, student and teacher, the training loop."""
