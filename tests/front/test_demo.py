"""The demo runs as a user runs it: as a module, in a process of its own."""

import re
import subprocess
import sys

import pytest

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

ROWS = ["torch default", "torch fused=True", "ours eager", "ours compiled=True"]


def run(*arguments, cwd):
    command = [sys.executable, "-m", "compiled_optim.demo", *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=1200, stdin=subprocess.DEVNULL)


def test_table_and_plot(tmp_path):
    plot = tmp_path / "plot.png"
    done = run("--epochs", "1", "--output", str(plot), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for row in ROWS:
        line = re.search(rf"^{re.escape(row)} .*$", done.stdout, re.MULTILINE)
        assert line, f"no row {row!r} in\n{done.stdout}"
        accuracy = re.search(r"([\d.]+)%", line[0])
        assert accuracy, line[0]
        assert 20 < float(accuracy[1]) <= 100  # ten classes: one epoch is well above chance
        assert re.search(r"[\d.]+ ms.* [\d.]+x .*[\d.]+ ms", line[0]), line[0]
    assert "Kernel cache" in done.stdout
    assert plot.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert plot.stat().st_size > 10_000
    assert [path.name for path in tmp_path.iterdir()] == ["plot.png"]


@pytest.mark.parametrize("arguments", [("--epochs", "0"), ("--threads", "0"), ("--epochs", "many")])
def test_bad_arguments(arguments, tmp_path):
    done = run(*arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert arguments[0] in done.stderr


def test_missing_package_is_named(tmp_path):
    code = "import sys; sys.modules['matplotlib'] = None; from compiled_optim.demo import main; main(['--epochs', '1'])"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 1
    assert "pip install compiled-optim[demo]" in done.stderr
