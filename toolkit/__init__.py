"""gblm: prune LLaMA-family models, pack the zeros away, serve the packed model."""

__version__ = "0.1.0"
