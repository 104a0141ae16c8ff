"""Checks of a user's own model: kinds that are refused by name, and every way to compute it against the plain torch module."""
