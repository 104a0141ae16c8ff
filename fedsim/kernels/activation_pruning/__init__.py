"""Layers that keep only the largest entries of their inputs for the backward pass."""
