"""Named tensors, their keys, random numbers, masks and the exact sum. Imports nothing else of fedsim but the errors."""
