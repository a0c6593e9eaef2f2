"""One step, one way for each parameter."""
