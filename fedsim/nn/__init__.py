"""The simulated network: a torch module as a pure function of a tree of tensors, its channels and its cuts."""
