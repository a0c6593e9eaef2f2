"""Native code, compiled once for a machine and kept on disk."""
