"""Runs on a cluster with SLURM: the batch texts, their submission, and what becomes of them."""
