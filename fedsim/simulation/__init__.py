"""A job becomes a run file: experiment, plan, rounds, evaluation, resume, export."""
