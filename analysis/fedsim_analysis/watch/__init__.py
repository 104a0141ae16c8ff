"""Runs in the terminal while they go on. It reads their files now and then; it takes no lock, and sends nothing to any process."""
