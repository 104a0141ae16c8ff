"""Emulated devices: how fast, how large and how well connected a client is, and what its work takes in seconds and joules."""
