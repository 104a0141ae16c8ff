"""Summaries of run files, from the run files alone."""
