"""What every long command shares: the run folder and its logs, checkpoints, ranks, optimisers."""
