"""Exports turn packed folders into other people's layouts, and theirs into ours."""
