"""Two ways to step, and the table of what each host made of them.

`make test-hosts` installs the frameworks, runs these tests and writes docs/hosts.md.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hosts_table import Table
from training import WAYS, Way


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--table", type=Path, help="write a row for each host and feature to this file")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "host(name, feature): a row of the table")
    if path := config.getoption("--table", default=None):
        config.pluginmanager.register(Table(path))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.parent == Path(__file__).parent:  # frameworks warn of themselves; a fallback is an error
            item.add_marker(pytest.mark.filterwarnings("ignore"))
            item.add_marker(pytest.mark.filterwarnings("error::compiled_optim.CompileFallbackWarning"))


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest) -> Way:
    """An eager and a compiled optimizer, one after the other."""
    return Way(request.param)


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem: Any) -> Any:
    passed = yield
    if way := pyfuncitem.funcargs.get("way"):
        assert way.seen, "nothing was asked about what ran"
        pyfuncitem.user_properties += [("ran", " and ".join(sorted(way.seen))), ("result", way.result)]
    return passed
