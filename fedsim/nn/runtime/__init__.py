"""The run-time layers: they replace a model's own layers while fedsim computes with it."""
