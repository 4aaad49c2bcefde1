"""This package turns records and packed folders into a page or Markdown; it measures nothing."""
