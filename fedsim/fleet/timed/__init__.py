"""Fleets with a virtual clock: who is asked, who answers in time, and what it takes in seconds and joules."""
