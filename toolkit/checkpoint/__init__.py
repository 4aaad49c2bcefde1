"""Model folders on disk: reading safely, writing in one step, describing, verifying."""
