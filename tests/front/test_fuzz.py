"""Random changes between and during steps: nothing crashes, nothing is half done, and values are torch.optim's."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

STEPS = 300


def test_random_changes_of_everything_around_a_step() -> None:
    """See fuzz/; the seed is fixed, so a finding is one that came with a change of the code."""
    command = [sys.executable, "-m", "fuzz", "--seed", "1", "--steps", str(STEPS), "--mild"]
    options = ["--algorithms", "Momentum,AdamW,Adagrad,Adafactor,Muon,LBFGS,Average", "--dtypes", "float64,complex128"]
    result = subprocess.run(
        *([*command, *options],),
        cwd=Path(__file__).parents[2],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
