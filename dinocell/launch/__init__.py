"""Run any command as a SLURM job, or in several processes on this machine."""
