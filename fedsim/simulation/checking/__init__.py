"""The check of a user's own model: at the start of a run, and by `fedsim check`."""
