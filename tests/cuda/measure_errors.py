"""How far the kernels for GPUs are from float64, for the table in graphs/README.md.

    PYTHONPATH=.:tests python tests/cuda/measure_errors.py graphs/measured.json

The kernels run in Triton's interpreter on the tensors of test_cuda_kernels.py.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from test_cuda_kernels import SKIPPED, Launch

from compiled_optim import graphs


def error(selection: graphs.Selection, dtype: torch.dtype) -> float:
    """The largest of all finite elements of a step, relative where a value exceeds 1."""
    torch.manual_seed(0)
    wide = [torch.float32] if "master_weights" in selection.options else []  # the state of what has a master
    launch = Launch(selection.cls, dict(selection.options), dtype, *wide)
    launch.update()
    worst = 0.0
    for i in set(range(len(launch.tensors))) - {SKIPPED}:
        for actual, expected in zip(launch.tensors[i], launch.expected(i), strict=True):
            off = (actual.double() - expected).abs() / expected.abs().clamp(min=1)
            worst = max([worst, *off[expected.isfinite()].tolist()])
    return worst


def main(file: Path) -> None:
    measured = json.loads(file.read_text())
    for s in graphs.selections():
        measured["error"][s.name] = {name: f"{error(s, dtype):.1e}" for name, dtype in graphs.DTYPES.items()}
        print(s.name, measured["error"][s.name], flush=True)
    file.write_text(json.dumps(measured, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
