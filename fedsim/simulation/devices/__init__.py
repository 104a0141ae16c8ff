"""A run whose clients have devices: the rules of the job, repeated rounds, and what is known before the first one."""
