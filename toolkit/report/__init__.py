"""Reports: record files and packed folders → one HTML page, or Markdown. Measures nothing."""
