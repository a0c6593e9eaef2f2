"""From an update rule to native code."""
