"""Models on disk and in memory: the opened folder, its safe reader, its decoder layers."""
