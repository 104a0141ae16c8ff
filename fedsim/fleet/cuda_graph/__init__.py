"""A pack of clients as one program of fixed shapes, on a GPU captured as a CUDA graph."""
