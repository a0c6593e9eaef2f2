"""The table of hosts in Markdown, from the outcomes of the tests that are marked with a host and a feature."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pytest

PACKAGES = (
    *("torch", "lightning", "accelerate", "transformers", "peft", "pytorch-ignite", "skorch", "pytorch_optimizer"),
    *("schedulefree", "hydra-core", "omegaconf", "jsonargparse", "torchmetrics", "scikit-learn"),
)
HEAD = """# Hosts

Small trainings inside the frameworks that own a training loop, each once with `torch.optim` and once with this package,
from the same seed. *Same result* says whether parameters agree at the end; the other columns say what ran according to
`explain` without and with `compiled=True`: `multi_tensor` is the compiled kernel. Written by `make test-hosts`.

timm 1.0.31 is left out: it needs torchvision, whose build in the package index (0.29.1) does not import beside the CPU
build of torch ("operator torchvision::nms does not exist").
"""


class Table:
    """A plugin of pytest that writes the file when all tests have run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: dict[tuple[str, str], dict[str, Any]] = {}

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item) -> Any:
        report = yield
        if marker := item.get_closest_marker("host"):
            way = item.callspec.params.get("way") if hasattr(item, "callspec") else None
            row = self.rows.setdefault(marker.args, {"passed": True, "result": "not run", "eager": "", "compiled": ""})
            row["passed"] &= report.outcome != "failed"
            if report.when == "teardown":
                said = dict(item.user_properties)
                row.update({way or "compiled": said.get("ran", "")}, result=said.get("result", "not run"))
        return report

    def pytest_sessionfinish(self) -> None:
        self.path.write_text("\n".join([HEAD, *self.lines(), ""]))

    def lines(self) -> Iterator[str]:
        yield "| host | feature | same result | eager | compiled |"
        yield "|---|---|---|---|---|"
        hosts = [host for host, _ in self.rows]
        for (host, feature), row in sorted(self.rows.items(), key=lambda entry: hosts.index(entry[0][0])):
            result = row["result"] or "yes" if row["passed"] else "NO"
            yield f"| {host} | {feature} | {result} | {row['eager']} | {row['compiled']} |"
        yield ""
        yield f"Versions, with Python {platform.python_version()} on {platform.system()}:"
        yield ", ".join(f"{name} {_version(name)}" for name in PACKAGES) + "."


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "(not installed)"
