"""One module per command: options, one call of the public function, the result for people."""
