"""Benchmarks run strict: a fallback must not be timed as a compiled step."""

import os

os.environ["COMPILED_OPTIM_STRICT"] = "1"
