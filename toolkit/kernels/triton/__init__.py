"""Triton kernels for packed weights: the first path on AMD GPUs, the second on NVIDIA's.

Triton is imported when a weight is first served, not before: `gblm.kernels.triton.kernels` does.
"""
