"""Measuring quality."""
