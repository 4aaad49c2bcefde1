"""Pruning runs: a checked job, the loop over its decoder layers, and the folder it ends in."""

from gblm.prune.run import Output, dry_run, prune

__all__ = ["Output", "dry_run", "prune"]
