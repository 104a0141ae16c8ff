"""Kernels for sparse layers, activation pruning and pooling, on CPU (numba) and CUDA (Triton). They know no model and no client.

Sparse layers work in CHWN layout: a tensor of shape (B, C, H, W) whose memory is (C, H, W, B). Then every kept weight is one
multiply-add over a contiguous run of images, and ReLU, additions and the code of models stay as they are.
"""
