"""Benchmarks run strict: a fallback must not be timed as compiled. torch.compile gets an empty cache of its own."""

import os
import tempfile

os.environ["COMPILED_OPTIM_STRICT"] = "1"
_inductor = tempfile.TemporaryDirectory(prefix="compiled_optim-bench-")
os.environ["TORCHINDUCTOR_CACHE_DIR"] = _inductor.name
