"""`fedsim batch`: what a batch script ends in. It starts the ranks, passes signals on, and has SLURM requeue a run that was stopped.

It is light until the ranks have been started: it hears signals at once, and takes no memory beside the ranks.
"""
