"""Kernels of truly sparse layers: kept weights alone, on images that lie innermost.

A tensor (B, C, H, W) by shape is images-innermost when it lies in memory as (C, H, W, B): then every kept weight is one
multiply-add over a contiguous run of images, and ReLU, additions and the code of models stay as they are.
"""
