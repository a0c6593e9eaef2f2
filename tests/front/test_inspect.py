"""``python -m compiled_optim inspect``: what will run, or one line that says what is wrong."""

from __future__ import annotations

import re
import subprocess
import sys
from typing import Any

import pytest
import torch
from beside_torch import parameters, set_gradients
from cases import CLASSES, FEW_KERNELS, named

import compiled_optim
from compiled_optim import __main__ as command
from compiled_optim.inspection import switches_of


def inspect(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    command.main(["inspect", *arguments])
    return capsys.readouterr().out


def flags(options: dict[str, Any]) -> list[str]:
    """The arguments of the command line that select what these options select."""
    return [w for k, v in options.items() for w in (f"--{k.replace('_', '-')}", *([] if v is True else [str(v)]))]


@pytest.mark.parametrize(("cls", "options"), FEW_KERNELS, ids=[f"{c.__name__}-{named(o)}" for c, o in FEW_KERNELS])
def test_it_shows_the_kernel_that_runs(cls: Any, options: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    kernel, *lines = inspect(capsys, cls.__name__, *flags(options)).splitlines()
    switches = cls.rule.declaration.read(cls.rule.declaration.check(options)).switches._asdict()
    assert kernel == f"{cls.__name__}({', '.join(k for k, on in switches.items() if on)})[float32]"
    assert lines[0] == "launches of a step: 1, temporaries: 0"
    assert "    bytes = " in "\n".join(lines)


def test_explain_names_the_same_kernel(capsys: pytest.CaptureFixture[str]) -> None:
    params = parameters()
    optimizer = compiled_optim.AdamW(params, amsgrad=True, compiled=True)
    set_gradients(params)
    optimizer.step()
    (row,) = compiled_optim.explain(optimizer, bandwidth=10)
    text = inspect(capsys, "AdamW", "--amsgrad", "--dtype", "fp64", "--bandwidth", "10")
    assert text.startswith(f"{row.kernel}\n")
    assert f"bytes of an element: {row.bytes_per_element}, at least" in text
    assert f"at 10 GB/s = {row.bytes_per_element * 100:g}\n" in text


def test_what_one_pass_does_beside_the_update(capsys: pytest.CaptureFixture[str]) -> None:
    p = torch.nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    p.grad = torch.ones_like(p)
    optimizer = compiled_optim.SGD([p], max_grad_norm=0.5, ema_decay=0.9, master_weights=True, compiled=True)
    optimizer.step()
    (row,) = compiled_optim.explain(optimizer)
    flags = ("--max-grad-norm", "--ema-decay", "0.9", "--master-weights")
    text = inspect(capsys, "SGD", *flags, "--dtype", "bf16")
    assert text.startswith(f"{row.kernel}\n")
    assert f"bytes of an element: {row.bytes_per_element}, at least {2 + 2 + 2 + 8 + 8}" in text
    for on_device in ((), ("--on-device",)):
        source = inspect(capsys, "SGD", *flags, "--dtype", "bf16", "--target", "sm_90", "--source", *on_device)
        assert ("factor = tl.load" in source) != bool(on_device)  # which reads it as it reads hyperparameters


def test_each_part_alone(capsys: pytest.CaptureFixture[str]) -> None:
    assert inspect(capsys, "SGD", "--fx").splitlines() == [
        *("param: flat torch.float32", "grad: flat torch.float32", "lr: 0-d torch.float32"),
        *("momentum: 0-d torch.float32", "gradient_weight: 0-d torch.float32", "weight_decay: 0-d torch.float32"),
        *("mul = aten.mul.Tensor(grad, lr)", "sub = aten.sub.Tensor(param, mul)"),
        "copy__default = aten.copy_.default(param, sub)",
    ]
    assert 'extern "C" void launch(' in inspect(capsys, "SGD", "--source")
    assert "    operations = n*(add + mul)\n" in inspect(capsys, "SGD", "--cost")


def test_gpus_need_not_be_there(capsys: pytest.CaptureFixture[str]) -> None:
    of_bf16 = ("AdamW", "--dtype", "bf16", "--target")
    used = r"AdamW_update: \d+ registers a thread, 0 bytes spilled, loads of up to 128 bits"
    assert re.search(used, inspect(capsys, *of_bf16, "sm_80"))
    assert ".target sm_90" in inspect(capsys, *of_bf16, "sm_90", "--ptx")
    source = inspect(capsys, *of_bf16, "sm_90", "--source", "--state-dtype", "fp32", "--on-device")
    assert {"def update(", "def prologue("} <= set(re.findall(r"def (?:update|prologue)\(", source))
    assert "tl.bfloat16" in source


def test_a_class_of_ones_own(capsys: pytest.CaptureFixture[str]) -> None:
    assert "[float32]" in inspect(capsys, "compiled_optim.algorithms.adam:Adam", "--weight-decay")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: command, optimizer"),
        (["inspect", "Adan"], "an optimizer must be module:class or one of ASGD, .*, got 'Adan'"),
        (["inspect", "LBFGS"], "got 'LBFGS'"),
        (["inspect", "nowhere:Adam"], "No module named 'nowhere'"),
        (["inspect", "torch:Tensor"], "an optimizer must be .*, got 'torch:Tensor'"),
        (["inspect", "AdamW", "--centered"], "unrecognized arguments: --centered"),
        (["inspect", "SGD", "--nesterov"], "nesterov=True needs momentum above 0"),
        (["inspect", "SGD", "--momentum=-1"], "momentum must be at least 0, got -1.0"),
        (["inspect", "SGD", "--ema-decay", "2"], "ema_decay must be at least 0 and at most 1, .*, got 2.0"),
        (["inspect", "AdamW", "--dtype", "int8"], "argument --dtype: invalid choice: 'int8'"),
        (["inspect", "AdamW", "--target", "sm_1"], "argument --target: invalid choice: 'sm_1'"),
        (["inspect", "Muon"], "Muon is not elementwise, so its step is not one kernel"),
        (["inspect", "AdamW", "--ptx"], "a kernel for cpu has no PTX"),
        (["inspect", "AdamW", "--on-device"], "cpu has no kernel that counts steps on the device"),
        (["inspect", "AdamW", "--fx", "--cost"], "argument --cost: not allowed with argument --fx"),
        (["inspect", "AdamW", "--cost", "--bandwidth", "0"], "--bandwidth must be above 0 GB/s, got 0.0"),
    ],
)
def test_what_does_not_exist(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        command.main(arguments)
    out, err = capsys.readouterr()
    assert (caught.value.code, out, err.count("\n")) == (2, "", 1)
    assert re.search(message, err)


def test_every_switch_is_a_flag(capsys: pytest.CaptureFixture[str]) -> None:
    for cls in CLASSES:
        with pytest.raises(SystemExit) as caught:
            command.main(["inspect", cls.__name__, "--help"])
        assert caught.value.code == 0
        text = capsys.readouterr().out
        assert all(f"--{name.replace('_', '-')}" in text for name in switches_of(cls))


def test_it_runs_as_a_module() -> None:
    command_line = [sys.executable, "-m", "compiled_optim", "inspect", "SGD", "--momentum", "0.9", "--cost"]
    done = subprocess.run(command_line, capture_output=True, text=True, check=True)
    assert "bytes of an element: 20, at least 20 by the declaration" in done.stdout
    assert not done.stderr
