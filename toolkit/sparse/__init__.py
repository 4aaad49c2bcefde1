"""Sparse weights as pure tensors: patterns, kinds of values, and formats on disk.

Nothing here knows models, kernels or files of a checkpoint; it imports `gblm.errors` and no other
part of gblm.
"""
