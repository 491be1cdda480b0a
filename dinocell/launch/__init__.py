"""Any command as a SLURM job, or as several processes on this machine."""
