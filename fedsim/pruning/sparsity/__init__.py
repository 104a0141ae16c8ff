"""Which weights a sparse model keeps: densities of layers, scores, choices, and averaging under masks."""
