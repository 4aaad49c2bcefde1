"""Recover: distil a packed model from its dense self, with frozen masks and no labels."""
