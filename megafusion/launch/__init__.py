"""`megafusion launch`: a run as a job of SLURM. The shell part is in launchers/."""
