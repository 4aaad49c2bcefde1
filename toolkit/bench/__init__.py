"""This package measures speed: of models side by side, of kernels, and of two live servers."""
