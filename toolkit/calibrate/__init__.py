"""Statistics of a model on calibration text: layer by layer, and gradients of the whole."""
