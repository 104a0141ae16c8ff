"""The layers that take the place of a model's own while fedsim computes with it."""
