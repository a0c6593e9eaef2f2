"""Processes: what a warm start imports, forks, threads, two writers, damage on disk."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import compiled_optim
from compiled_optim._engine.kernels import registry
from compiled_optim._engine.kernels.trace import Signature, trace
from compiled_optim._engine.torch_private import inductor
from compiled_optim.declare import number

TRAIN = """
import json, os, sys, torch
import compiled_optim
def train(compiled=True, steps=5):
    torch.manual_seed(0)
    p = torch.nn.Parameter(torch.randn(1000))
    optimizer = compiled_optim.AdamW([p], lr=0.1, compiled=compiled)
    for _ in range(steps):
        p.grad = p.detach() * 2
        optimizer.step()
    return p.detach(), optimizer
value, optimizer = train()
row, = compiled_optim.explain(optimizer)
facts = dict(sum=value.sum().item(), execution=row.execution, origin=row.origin, info=list(compiled_optim.cache_info()),
             modules=[m for m in ("torch._inductor", "torch._dynamo", "torch.distributed.tensor", "sympy",
                                  "host") if m in sys.modules])
"""
REPORT = "\nprint(json.dumps(facts))\n"


def run(code: str, **environment: str) -> dict[str, Any]:
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=1200,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    facts: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return facts


@pytest.fixture(scope="module")
def warm(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, float]:
    """A cache directory that holds the kernel, and the result that every run must give."""
    place = tmp_path_factory.mktemp("warm")
    directory = str(place / "cache")
    facts = run(TRAIN + REPORT, COMPILED_OPTIM_CACHE_DIR=directory, TORCHINDUCTOR_CACHE_DIR=str(place / "inductor"))
    # lowering writes nothing in a directory that is Inductor's
    assert not [path for path in (place / "inductor").rglob("*") if path.is_file()]
    assert (facts["execution"], facts["origin"]) == ("multi_tensor", "compiled")
    return directory, facts["sum"]


def test_warm_start_imports_no_compiler_and_runs_none(warm: tuple[str, float]) -> None:
    spy = """
import subprocess, sys, torch  # whose own import may run one
def refuse(*a, **k): raise AssertionError("a warm start ran a program")
subprocess.Popen.__init__ = refuse
"""
    facts = run(spy + TRAIN + REPORT, COMPILED_OPTIM_CACHE_DIR=warm[0])
    assert facts["modules"] == []
    assert facts["origin"] == "disk"
    assert facts["info"] == [0, 1, 0, 1]
    assert facts["sum"] == warm[1]


def test_warm_start_without_a_compiler(warm: tuple[str, float], tmp_path: Path) -> None:
    facts = run(TRAIN + REPORT, COMPILED_OPTIM_CACHE_DIR=warm[0], PATH=str(tmp_path), CXX="")
    assert (facts["origin"], facts["sum"]) == ("disk", warm[1])


def test_nothing_on_the_cpu_needs_triton(warm: tuple[str, float]) -> None:
    """A warm start, a cold one (RMSprop has no kernel there), and a rule in a user's graph."""
    hide = """
import sys
class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "triton":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Hidden())
import warnings
warnings.filterwarnings("ignore", "`torch.jit.script", DeprecationWarning)  # torch's own
"""
    code = """
p = torch.nn.Parameter(torch.ones(3))
cold, traced = compiled_optim.RMSprop([p], compiled=True), compiled_optim.SGD([p], lr=0.5)
@torch.compile
def loop(x):
    (p * x).sum().backward()
    traced.step()
    traced.zero_grad()
loop(torch.ones(3))
p.grad = torch.zeros(3)
cold.step()
facts["found"] = [row.origin for row in compiled_optim.explain(cold)]
facts.update(traced=p.tolist(), triton="triton" in sys.modules)
"""
    facts = run(hide + TRAIN + code + REPORT, COMPILED_OPTIM_CACHE_DIR=warm[0])
    assert (facts["origin"], facts["found"], facts["traced"]) == ("disk", ["compiled"], [0.5] * 3)
    assert not facts["triton"]


def test_everything_but_step_works_without_dynamo(warm: tuple[str, float]) -> None:
    code = (
        TRAIN
        + """
import copy
optimizer.add_param_group({"params": [torch.nn.Parameter(torch.zeros(2))]})
optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
optimizer.zero_grad()
facts["modules"] = [m for m in ("torch._inductor", "torch._dynamo") if m in sys.modules]
"""
        + REPORT
    )
    assert run(code, COMPILED_OPTIM_CACHE_DIR=warm[0])["modules"] == []


@pytest.mark.parametrize("fault", ["truncate", "flip", "empty", "garbage manifest"])
def test_damaged_kernels_are_rebuilt_and_never_loaded(fault: str, warm: tuple[str, float], tmp_path: Path) -> None:
    directory = tmp_path / "cache"
    shutil.copytree(warm[0], directory)
    for file in [*directory.glob("*.so")] if fault != "garbage manifest" else [*directory.glob("*.json")]:
        data = bytearray(file.read_bytes())
        if fault == "flip":
            data[len(data) // 2] ^= 1
        file.write_bytes({"truncate": data[: len(data) // 3], "empty": b"", "flip": data}.get(fault, b"{"))
    second = run(TRAIN + REPORT, COMPILED_OPTIM_CACHE_DIR=str(directory))
    assert (second["origin"], second["sum"]) == ("compiled", warm[1])
    third = run(TRAIN + REPORT, COMPILED_OPTIM_CACHE_DIR=str(directory))
    assert (third["origin"], third["sum"]) == ("disk", warm[1])


def test_two_processes_compile_at_once(tmp_path: Path) -> None:
    environment = {**os.environ, "COMPILED_OPTIM_CACHE_DIR": str(tmp_path / "cache")}
    command = [sys.executable, "-W", "error", "-c", TRAIN + REPORT]
    both = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    facts = [json.loads(process.communicate(timeout=1200)[0].splitlines()[-1]) for process in both]
    assert facts[0]["sum"] == facts[1]["sum"]
    assert all(f["execution"] == "multi_tensor" for f in facts)
    assert len(list((tmp_path / "cache").glob("*.json"))) == 2  # the kernel and the host module
    assert not list((tmp_path / "cache").glob("*.tmp"))


def test_a_forked_child_steps_with_one_thread(warm: tuple[str, float]) -> None:
    # after an OpenMP region in the parent; libgomp's threads do not survive the fork
    code = (
        TRAIN
        + """
train_big = compiled_optim.AdamW([torch.nn.Parameter(torch.ones(1 << 18))], compiled=True)
train_big.param_groups[0]["params"][0].grad = torch.ones(1 << 18)
train_big.step()
from compiled_optim._engine.executions.norms import total_norm
norm = total_norm(ones := [torch.ones(1 << 18)], 2.0, compiled=True)
read, write = os.pipe()
child = os.fork()
if child == 0:
    train_big.step()
    assert total_norm(ones, 2.0, compiled=True) == norm
    torch.set_num_threads(1)  # for torch's own operations below, which hang without
    os.write(write, json.dumps([train()[0].sum().item(), train_big.param_groups[0]["params"][0].sum().item()]).encode())
    os._exit(0)
train_big.step()
status = os.waitpid(child, 0)[1]
facts = dict(status=status, child=json.loads(os.read(read, 4096)), sum=facts["sum"],
             big=train_big.param_groups[0]["params"][0].sum().item())
"""
        + REPORT
    )
    facts = run(code, COMPILED_OPTIM_CACHE_DIR=warm[0])
    assert facts["status"] == 0
    assert facts["child"] == [facts["sum"], facts["big"]]


def test_a_child_forked_before_the_first_step(warm: tuple[str, float]) -> None:
    """The parent has OpenMP's threads by then; what the child loads must not ask for a team of them."""
    code = """
import json, os, torch
import compiled_optim
from compiled_optim.lbfgs import history
torch.set_num_threads(2)
torch.ones(1 << 20).sum()
p = torch.nn.Parameter(torch.ones(1 << 14))  # for torch's operations one thread is enough
p.grad = torch.ones(1 << 14)
child = os.fork()
if child == 0:
    compiled_optim.AdamW([p], lr=0.5, weight_decay=0, compiled=True).step()
    os._exit(0 if abs(p[0].item() - 0.5) < 1e-6 and history._threads(p) == 1 else 1)
facts = dict(status=os.waitpid(child, 0)[1])
"""
    assert run(code + REPORT, COMPILED_OPTIM_CACHE_DIR=warm[0])["status"] == 0


LOWERING = """
import os, sys, threading, json, torch
import compiled_optim
from compiled_optim._engine.torch_private import inductor
torch.set_num_threads(1)
def step(cls, **options):
    p = torch.nn.Parameter(torch.ones(4)); p.grad = torch.ones(4)
    cls([p], lr=1.0, compiled=True, **options).step()
    return p.detach()[0].item()
"""


def test_a_child_forked_while_a_thread_lowers(warm: tuple[str, float]) -> None:
    """It waits for the end of that; the child lowers and compiles what it needs."""
    code = (
        LOWERING
        + """
lowering, stock = threading.Event(), inductor._inductor
def announced(settings):
    lowering.set()
    return stock(settings)
inductor._inductor = announced
thread = threading.Thread(target=step, args=(compiled_optim.Adadelta,))  # of which no other test keeps a kernel there
thread.start()
lowering.wait()
child = os.fork()
if child == 0:
    os._exit(0 if step(compiled_optim.SGD) == 0.0 else 1)
facts = dict(status=os.waitpid(child, 0)[1])
thread.join()
"""
        + REPORT
    )
    assert run(code, COMPILED_OPTIM_CACHE_DIR=warm[0])["status"] == 0


def test_a_child_forked_amid_a_lowering_falls_back() -> None:
    code = (
        LOWERING
        + """
import warnings
inductor._FORK_SECONDS = 0.01
release = threading.Event()
def hold():
    with inductor._lock:
        held.set()
        release.wait()
held = threading.Event()
threading.Thread(target=hold).start()
held.wait()
child = os.fork()
if child == 0:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        value = step(compiled_optim.SGD)
    os._exit(0 if value == 0.0 and "forked while another thread" in str(caught[0].message) else 1)
release.set()
facts = dict(status=os.waitpid(child, 0)[1])
"""
        + REPORT
    )
    assert run(code, COMPILED_OPTIM_STRICT="0", COMPILED_OPTIM_DISK_CACHE="0")["status"] == 0


def test_one_libgomp_and_thread_count_of_torch(warm: tuple[str, float]) -> None:
    code = (
        TRAIN
        + """
facts["gomp"] = sorted({line.split()[-1] for line in open("/proc/self/maps") if "libgomp" in line})
tasks = lambda: len(os.listdir("/proc/self/task"))
torch.set_num_threads(1)
before = tasks()
p = torch.nn.Parameter(torch.ones(1 << 20)); p.grad = torch.ones(1 << 20)
compiled_optim.SGD([p], compiled=True).step() if False else compiled_optim.AdamW([p], compiled=True).step()
facts["started"] = tasks() - before
"""
        + REPORT
    )
    facts = run(code, COMPILED_OPTIM_CACHE_DIR=warm[0])
    assert len(facts["gomp"]) == 1
    assert facts["started"] == 0


def test_loading_changes_no_denormal_flag(warm: tuple[str, float]) -> None:
    code = TRAIN + "facts['denormal'] = (torch.tensor([1e-39]) * 1.0).item()" + REPORT
    assert run(code, COMPILED_OPTIM_CACHE_DIR=warm[0])["denormal"] > 0


def in_threads(count: int, work: Callable[[int], None]) -> None:
    errors: list[BaseException] = []

    def guarded(i: int) -> None:
        try:
            work(i)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(i,)) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors


def lowered(rule: Callable[..., Any]) -> str:
    """The source that a rule is lowered to."""

    class Rule(compiled_optim.Optimizer):
        lr: float = number(default=1e-3)
        update = staticmethod(rule)

        @staticmethod
        def scalars(h: Any, step: Any) -> dict[str, Any]:
            return {"lr": h.lr}

    switches = Rule.rule.declaration.read(Rule.rule.declaration.check({})).switches
    return inductor.lower_cpp(trace(Signature(Rule.rule, switches, (torch.float32,), (), ("lr",)))).source


def plain_update(p: Any, g: Any, s: Any, k: Any, on: Any) -> Any:
    return p - g * k.lr


def test_lowering_changes_nothing_for_another_thread() -> None:
    """A compiled function is called, one is compiled, and a module is called while a rule is traced."""
    expected = lowered(plain_update)
    double, model = torch.compile(lambda x: x * 2, backend="eager"), torch.nn.Linear(2, 2)
    double(torch.ones(2))
    stock = torch.nn.Module.__call__
    seen: list[Any] = []

    def use() -> None:
        seen.append((double(torch.ones(2)).tolist(), model(torch.ones(2)).shape, torch.nn.Module.__call__ is stock))

    def update(p: Any, g: Any, s: Any, k: Any, on: Any) -> Any:
        in_threads(1, lambda _: use())
        return plain_update(p, g, s, k, on)

    assert lowered(update) == expected
    assert {repr(each) for each in seen} == {repr(([2.0, 2.0], torch.Size([2]), True))}


def test_dynamo_compiles_before_or_after_lowering() -> None:
    """Neither sees what the other changes while it lasts."""
    compiling, order = threading.Event(), []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        order.append("graph")
        return graph.forward

    def compile_graph() -> None:
        compiling.set()
        assert torch.compile(lambda x: x * 3, backend=backend)(torch.ones(1)).item() == 3

    thread = threading.Thread(target=compile_graph)

    def update(p: Any, g: Any, s: Any, k: Any, on: Any) -> Any:
        if inductor.holds_dynamo() and not compiling.is_set():
            thread.start()
            compiling.wait()
            thread.join(0.2)  # which it would have done in this time, were it let
            order.append("rule")
        return plain_update(p, g, s, k, on)

    lowered(update)
    thread.join()
    assert order == ["rule", "graph"]


def test_kernels_begun_in_a_trace_do_not_wait_for_who_waits_for_it() -> None:
    """Dynamo's lock is held by who begins kernels, and waited for by who holds that of the kernels."""
    held, release = threading.Event(), threading.Event()

    def obtain(_: int) -> None:
        with registry._lock:
            held.set()
            release.wait()

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        assert inductor.holds_dynamo()
        registry.prefetch(())
        release.set()
        return graph.forward

    thread = threading.Thread(target=obtain, args=(0,))
    thread.start()
    held.wait()
    assert torch.compile(lambda x: x * 5, backend=backend)(torch.ones(1)).item() == 5
    thread.join()
    assert not inductor.holds_dynamo()


def test_sixteen_threads_with_an_optimizer_each_share_one_kernel() -> None:
    compiled_optim.cache_clear()
    start = torch.randn(70_000, dtype=torch.float64)
    results: dict[int, torch.Tensor] = {}

    def work(i: int) -> None:
        p = torch.nn.Parameter(start.clone())
        optimizer = compiled_optim.AdamW([p], lr=0.1, compiled=True)
        for _ in range(20):
            p.grad = p.detach() * 2
            optimizer.step()
        results[i] = p.detach()

    in_threads(16, work)
    assert compiled_optim.cache_info().kernels == 1
    assert len(results) == 16
    for value in results.values():
        assert torch.equal(value, results[0])


def test_one_optimizer_in_two_threads_is_an_error_or_in_turn_never_a_crash() -> None:
    p = torch.nn.Parameter(torch.zeros(1 << 20))
    p.grad = torch.ones(1 << 20)
    optimizer = compiled_optim.SGD([p], lr=1.0, compiled=True)
    optimizer.step()
    done: list[int] = []
    refused: list[str] = []

    def work(i: int) -> None:
        for _ in range(50):
            try:
                optimizer.step()
                done.append(i)
            except RuntimeError as error:
                refused.append(str(error))

    in_threads(4, work)
    assert torch.equal(p.detach(), torch.full_like(p, -1.0 - len(done)))
    assert all("already running in another thread" in message for message in refused)
    assert len(done) + len(refused) == 200
