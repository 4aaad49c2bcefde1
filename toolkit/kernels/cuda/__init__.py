"""CUDA kernels for packed weights: text that NVRTC compiles when a layer first needs it.

Nothing here is imported by the core beyond Python and torch; libcuda and NVRTC are found at use.
"""
