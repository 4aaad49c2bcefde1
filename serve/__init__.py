"""Packed models are served in the servers that people run."""
