"""Triton kernels for packed weights: the first path on AMD GPUs, the second on NVIDIA's.

Only `gblm.kernels.triton.kernels` imports Triton, and only when a weight is first served with it.
"""
