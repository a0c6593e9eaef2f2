"""The version of the package; packaging reads it from here, so it stays a literal."""

__version__ = "0.1.0"
