"""Convolutions and linear layers on kept weights alone, on CPU (numba) and CUDA (Triton)."""
