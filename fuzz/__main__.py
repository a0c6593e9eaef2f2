"""Runs episodes in a child process, so that a crash is a finding as well, and prints what was found."""

from __future__ import annotations

import argparse
import faulthandler
import json
import logging
import os
import subprocess
import sys
import tempfile
import warnings
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .known import Finding, known

SANITIZERS = "-fsanitize=address,undefined -fno-omit-frame-pointer -g1"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m fuzz", description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=1000, help="how many steps to take")
    parser.add_argument("--episode", type=int, help="run this one only, as a finding names it")
    parser.add_argument("--algorithms", default="SGD,Momentum,AdamW,Adagrad,LBFGS,Average", help="or 'all'")
    parser.add_argument("--dtypes", default="float64,float32,bfloat16,complex128")
    parser.add_argument(
        "--mild",
        action="store_true",
        help="no memory shared or resized, no kernels of its own",
    )
    parser.add_argument("--sanitize", action="store_true", help="build all C++ with AddressSanitizer and UBSan")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--first", type=int, help=argparse.SUPPRESS)  # of the episodes of a child process
    return parser.parse_args()


def work(options: argparse.Namespace) -> None:
    """In the child: one line of JSON before each step and for each finding."""
    faulthandler.enable()
    warnings.simplefilter("ignore")
    logging.disable()
    import torch

    from .subjects import ALGORITHMS
    from .worker import Episode, Settings

    torch.set_num_threads(options.threads)
    names = list(ALGORITHMS) if options.algorithms == "all" else options.algorithms.split(",")
    settings = Settings(options.seed, names, options.dtypes.split(","), options.mild)

    def tell(kind: str, value: Any) -> None:
        print(json.dumps([kind, value]), flush=True)

    number, left = options.first, options.steps
    while left > 0:
        tell("episode", number)
        episode = Episode(settings, number, lambda e: tell("step", [e.name, e.doing]))
        for finding in episode.run():
            tell("finding", asdict(finding))
        tell("compared", episode.compared)
        number, left = number + 1, left - max(1, episode.steps)
        if options.episode is not None:
            return


def sanitized() -> dict[str, str]:
    """An environment in which all that is compiled is instrumented; libstdc++ first, or C++ exceptions abort."""
    compiler = os.environ.get("CXX") or "g++"

    def library(name: str) -> str:
        return subprocess.check_output([*compiler.split(), f"-print-file-name={name}"], text=True).strip()

    return {
        "CXX": f"{compiler} {SANITIZERS}",
        "LD_PRELOAD": " ".join(map(library, ("libasan.so", "libubsan.so", "libstdc++.so.6"))),
        "ASAN_OPTIONS": "detect_leaks=0:halt_on_error=1:detect_odr_violation=0",
        "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1",
    }


def run(options: argparse.Namespace, environment: dict[str, str]) -> tuple[list[Finding], Counter[str]]:
    """What was found, and how many steps were taken and compared. After a crash the next episode goes on."""
    findings: list[Finding] = []
    counts: Counter[str] = Counter()
    episode = options.episode or 0
    while counts["steps"] < options.steps:
        numbers = ["--first", str(episode), "--steps", str(options.steps - counts["steps"])]
        last: Any = ["", []]
        with tempfile.TemporaryFile("w+") as printed:
            command = [sys.executable, "-m", "fuzz", *sys.argv[1:], *numbers]
            child = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=printed, text=True)
            for line in child.stdout or ():
                kind, value = json.loads(line)
                if kind == "episode":
                    episode = value
                elif kind == "step":
                    counts["steps"] += 1
                    last = value
                elif kind == "compared":
                    counts["compared"] += value
                else:
                    findings.append(Finding(**value))
            if child.wait() == 0:
                break
            printed.seek(0)
            report = printed.read()
        seed = f"{options.seed} --episode {episode}"
        findings.append(Finding("crash", last[0], seed, last[1], f"status {child.returncode}: {report[-4000:]}"))
        episode += 1
        counts["steps"] += 1  # so that it ends
        if options.episode is not None:
            break
    return findings, counts


def main() -> int:
    options = arguments()
    if options.first is not None:
        work(options)
        return 0
    with tempfile.TemporaryDirectory(prefix="compiled_optim-fuzz-") as directory:
        cache = os.environ.get("COMPILED_OPTIM_CACHE_DIR")
        if cache is None or options.sanitize:
            cache = str(Path(directory) / "cache")
        environment = {**os.environ, "COMPILED_OPTIM_CACHE_DIR": cache, "COMPILED_OPTIM_STRICT": "0"}
        findings, counts = run(options, {**environment, **(sanitized() if options.sanitize else {})})
    unknown = [f for f in findings if not known(f)]
    for (kind, _), members in _grouped(unknown).items():
        print(f"\n{len(members)} x {kind}")
        for f in members[:3]:
            print(f"    {f.subject}, --seed {f.seed}, after {', '.join(f.changes) or 'no change'}")
            for line in [*f.message.splitlines(), *([f"torch: {f.stock}"] if f.stock else [])]:
                print(f"        {line}")
    for reason, n in Counter(filter(None, map(known, findings))).most_common():
        print(f"\n{n} x as listed: {reason}")
    print(f"\n{counts['steps']} steps, {counts['compared']} compared with torch, {len(unknown)} findings")
    return bool(unknown)


def _grouped(findings: list[Finding]) -> dict[tuple[str, str], list[Finding]]:
    """By kind and the beginning of the message."""
    groups: dict[tuple[str, str], list[Finding]] = {}
    for f in sorted(findings, key=lambda f: f.kind):
        groups.setdefault((f.kind, (f.message + f.stock)[:24]), []).append(f)
    return groups


if __name__ == "__main__":
    sys.exit(main())
