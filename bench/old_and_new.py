"""Step times of two checkouts of this package, in rotation, so that a machine that slows down slows both.

    python bench/old_and_new.py OLD NEW [--json FILE]

A process of each checkout takes turns at every contestant; first steps take a process each. What is printed are medians
and the median of the ratios of turns, new to old.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

CONTESTANTS = [  # class, options, shapes, steps of a turn
    ("AdamW", {"compiled": True}, "SMALL", 200),
    ("SGD", {"compiled": True, "momentum": 0.9}, "SMALL", 200),
    ("AdamW", {"compiled": True}, "TINY", 400),
    ("AdamW", {"compiled": True}, "LORA", 100),
    ("AdamW", {"compiled": True}, "resnet50", 8),
    ("AdamW", {"compiled": True}, "ONES", 200),
    ("AdamW", {"compiled": True}, "MANY_ONES", 10),
    ("AdamW", {"compiled": True}, "a compiled iteration", 40),
    ("AdamW", {}, "a compiled iteration", 40),
    ("AdamW", {}, "SMALL", 20),
    ("AdamW", {"foreach": False}, "SMALL", 10),
    ("AdamW", {}, "resnet50", 4),
]

WORKER = """
import gc, json, sys, time, torch
sys.path.insert(0, sys.argv[1])
import compiled_optim, shapes
steps_of = {}
gc.disable()

def prepared(name, options, which):
    cls = getattr(compiled_optim, name)
    if which == "a compiled iteration":
        model = torch.nn.Sequential(*[m for _ in range(8) for m in (torch.nn.Linear(32, 32), torch.nn.Tanh())])
        optimizer = cls(model.parameters(), lr=1e-3, **options)
        @torch.compile
        def iteration(x):
            model(x).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        x = torch.randn(4, 32)
        return [], lambda: iteration(x)
    found = getattr(shapes, which)
    params = [torch.nn.Parameter(torch.randn(s)) for s in (found() if callable(found) else found)]
    optimizer = cls(params, lr=1e-3, **options)
    for p in params: p.grad = torch.randn_like(p)
    return params, optimizer.step

for line in sys.stdin:
    name, options, which, fresh, steps = json.loads(line)
    key = line.rpartition(",")[0]
    if key not in steps_of:
        steps_of[key] = prepared(name, options, which)
    params, step = steps_of[key]
    times = []
    for _ in range(steps):
        if fresh:
            for p in params: p.grad = p.grad.clone()
        begun = time.perf_counter()
        step()
        times.append(time.perf_counter() - begun)
    print(json.dumps(times), flush=True)
"""

FIRST = """
import gc, sys, time, torch
sys.path.insert(0, sys.argv[1])
import shapes
params = [torch.nn.Parameter(torch.zeros(s)) for s in shapes.SMALL]
for p in params: p.grad = torch.ones_like(p)
gc.collect()  # or the collection that torch's import has made due falls into either first step, by chance
begun = time.perf_counter()
import compiled_optim
compiled_optim.AdamW(params, compiled=True).step()
print(time.perf_counter() - begun)
"""


def environment(checkout: Path, cache: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(checkout), "COMPILED_OPTIM_CACHE_DIR": cache}


def steps(checkouts: list[Path], rounds: int, directory: str) -> dict[str, list[list[float]]]:
    """By contestant, the median step of each turn: of the old checkout, and of the new."""
    shapes = str(Path(__file__).parent)
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, shapes],
            **{"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "cwd": directory},
            env=environment(checkout, f"{directory}/cache{i}"),
        )
        for i, checkout in enumerate(checkouts)
    ]

    def turn(i: int, contestant: list[Any]) -> float:
        worker = workers[i]
        assert worker.stdin
        assert worker.stdout
        worker.stdin.write(json.dumps(contestant) + "\n")
        worker.stdin.flush()
        return median(json.loads(worker.stdout.readline()))

    found = {}
    for name, options, shape, count in CONTESTANTS:
        for fresh in (False,) if shape == "a compiled iteration" else (False, True):
            contestant = [name, options, shape, fresh, count]
            times: list[list[float]] = [[], []]
            for k in range(rounds + 1):
                for i in (0, 1) if k % 2 else (1, 0):
                    times[i].append(turn(i, contestant))
            what = ", ".join([name, *(f"{k}={v}" for k, v in options.items()), shape, *(["new gradients"] * fresh)])
            found[what] = [each[1:] for each in times]  # the first turn warms up
    for worker in workers:
        worker.communicate()
    return found


def first_steps(checkouts: list[Path], rounds: int, directory: str) -> dict[str, list[list[float]]]:
    found: dict[str, list[list[float]]] = {"first step, cold": [[], []], "first step, warm": [[], []]}
    for k in range(rounds):
        for i in (0, 1) if k % 2 else (1, 0):
            for times in found.values():
                command = [sys.executable, "-c", FIRST, str(Path(__file__).parent)]
                cache = environment(checkouts[i], f"{directory}/first{k}-{i}")
                ran = subprocess.run(command, env=cache, cwd=directory, capture_output=True, text=True, check=True)
                times[i].append(float(ran.stdout))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", type=Path, help="write all turns here")
    options = parser.parse_args()
    checkouts = [options.old.absolute(), options.new.absolute()]
    with tempfile.TemporaryDirectory() as directory:
        found = steps(checkouts, options.rounds, directory)
        found |= first_steps(checkouts, max(2, options.rounds // 3), directory)
    for what, (old, new) in found.items():
        ratio = median(b / a for a, b in zip(old, new, strict=True))
        print(f"{what:55} old {median(old) * 1e6:12.1f} us  new {median(new) * 1e6:12.1f} us  ratio {ratio:.3f}")
    if options.json:
        options.json.write_text(json.dumps({"machine": platform.processor(), "turns": found}, indent=1))


if __name__ == "__main__":
    main()
