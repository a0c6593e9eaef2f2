"""Records of what each rule becomes: its FX graph and its kernel of each backend, as text to read and to compare.

    python -m compiled_optim.graphs graphs

A test compares the records with what the code makes now, so that a change to a kernel is seen in review.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from compiled_optim import algorithms
from compiled_optim._engine.kernels import backends
from compiled_optim._engine.kernels.registry import bytes_per_element
from compiled_optim._engine.kernels.trace import Signature, Traced, trace
from compiled_optim._engine.rule import first_scalars
from compiled_optim.declare import Flag
from compiled_optim.optimizer import Optimizer


def signatures() -> Iterator[tuple[str, Signature]]:
    """A file name and a kernel: of each algorithm in float32, with its defaults and with all its switches on."""
    for name in algorithms.__all__:
        cls: type[Optimizer] = getattr(algorithms, name)
        declaration = cls.rule.declaration
        defaults = declaration.check({})
        switches = {k: v for k, v in declaration.options.items() if v.switch and v.init}
        everything = {**defaults, **{k: True if isinstance(v, Flag) else 0.1 for k, v in switches.items()}}
        for suffix, options in (("", defaults), ("-all-switches", everything)):
            choice = declaration.read(options)
            buffers = declaration.kept(choice.switches)
            scalars = tuple(first_scalars(cls.rule, choice.hyper))
            dtypes = (torch.float32,) * (1 + len(buffers))
            yield name + suffix, Signature(cls.rule, choice.switches, dtypes, buffers, scalars)


def records() -> dict[str, str]:
    """The text of each record by file name."""
    texts: dict[str, str] = {}
    for name, signature in signatures():
        for backend in backends.BACKENDS:
            traced = trace(signature, backend.device_type)
            lowered = backend.lower(traced, portable=True)
            traffic = f"launches per step: 1, bytes per element: {bytes_per_element(signature, lowered)}"
            texts[f"{name}{backend.record_suffix}"] = f"// {traffic}\n{backend.driver(signature, lowered)}"
            lines = [f"# {signature.name}", f"# {traffic}", "", *_graph_lines(traced), ""]
            texts.setdefault(f"{name}.fx.txt", "\n".join(lines))
    return texts


def _graph_lines(traced: Traced) -> Iterator[str]:
    def text(argument: Any) -> str:
        return str(roles.get(argument, argument))

    roles = {n: n.meta["role"] for n in traced.graph.graph.nodes if "role" in n.meta}
    for node in traced.graph.graph.nodes:
        if node.op == "placeholder":
            kind = "0-d" if node.meta["val"].dim() == 0 else "flat"
            yield f"{roles[node]}: {kind} {node.meta['val'].dtype}"
        elif node.op == "call_function":
            yield f"{node.name} = {node.target}({', '.join(text(a) for a in node.args)})"


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the FX graph and the CPU kernel of every algorithm.")
    parser.add_argument("directory", type=Path)
    directory: Path = parser.parse_args().directory
    directory.mkdir(exist_ok=True)
    texts = records()
    for old in directory.iterdir():
        if old.name.endswith((".fx.txt", ".cpp")) and old.name not in texts:
            old.unlink()
    for name, text in texts.items():
        (directory / name).write_text(text)


if __name__ == "__main__":
    main()
