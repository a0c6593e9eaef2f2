"""Benchmarks run strict, for a fallback must not be timed as a compiled step, and with an empty cache for torch.compile."""

import os
import tempfile

os.environ["COMPILED_OPTIM_STRICT"] = "1"
_inductor = tempfile.TemporaryDirectory(prefix="compiled_optim-bench-")
os.environ["TORCHINDUCTOR_CACHE_DIR"] = _inductor.name
