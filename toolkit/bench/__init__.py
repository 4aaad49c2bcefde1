"""Measuring speed: orchestration, statistics and records around existing load generators."""
