"""CUDA kernels for packed weights: text that NVRTC compiles when a layer first needs it.

Importing this needs Python and torch only; libcuda and NVRTC are looked for when they are used.
"""
