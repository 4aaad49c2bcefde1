"""Serving packed models in the servers people run."""
