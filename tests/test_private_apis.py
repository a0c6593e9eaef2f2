"""What compiled_optim takes from torch's private parts, one test each: a failure here says which upstream change broke.

Everything private is used in compiled_optim/lower.py, and by launch/tensors.h.
"""

from __future__ import annotations

import inspect

import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from compiled_optim import kernels, lower
from compiled_optim.algorithms import AdamW
from compiled_optim.testing import assert_compiles
from compiled_optim.trace import Signature, trace


def signature() -> Signature:
    choice = AdamW.declaration.choose(AdamW.declaration.check({}))
    scalars = tuple(AdamW.scalars(choice.hyper, 1))
    return Signature(AdamW, choice.switches, (torch.float32,) * 3, ("exp_avg", "exp_avg_sq"), scalars)


def test_version_is_in_the_range_that_was_checked() -> None:
    assert lower.unsupported_version() is None


@pytest.mark.parametrize("version", ["2.12.1", "2.16.0+cpu", "3.0.0a0"])
def test_other_versions_are_refused(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", version)
    assert version in (lower.unsupported_version() or "")


def test_optimizer_methods_are_wrapped_so_that_they_unwrap() -> None:
    for name in ("add_param_group", "state_dict", "load_state_dict", "zero_grad"):
        method = getattr(torch.optim.Optimizer, name)
        assert inspect.unwrap(method).__module__ == "torch.optim.optimizer"
        assert inspect.unwrap(method) is not method, f"Optimizer.{name} is no longer decorated: call it as it is"


def test_hooks_of_optimizers_are_where_they_were() -> None:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)])
    assert not lower.step_is_observed(optimizer)
    handle = register_optimizer_step_pre_hook(lambda *_: None)
    assert lower.step_is_observed(optimizer)
    handle.remove()
    optimizer.register_step_post_hook(lambda *_: None)
    assert lower.step_is_observed(optimizer)
    assert callable(torch.optim.Optimizer.profile_hook_step)


def test_profiler_state_can_be_asked() -> None:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)])
    with torch.autograd.profiler.profile():
        assert lower.step_is_observed(optimizer)
    assert not lower.step_is_observed(optimizer)


def test_stance_is_where_it_was() -> None:
    assert lower.compiling_disabled() is None
    with torch.compiler.set_stance("force_eager"):
        assert "force_eager" in (lower.compiling_disabled() or "")
    assert lower.compiling_disabled() is None


def test_a_step_inside_a_compiled_function_runs_outside_its_graphs() -> None:
    seen = []

    def inside(x: torch.Tensor) -> torch.Tensor:
        seen.append(torch.compiler.is_compiling())
        return x + 1

    outside = lower.outside_graphs(inside)
    compiled = torch.compile(lambda x: outside(x * 2) * 3, backend="eager")
    with assert_compiles(graphs=2):
        assert compiled(torch.ones(1)).item() == 9
    assert seen == [False]


def test_dynamo_counts_its_graphs() -> None:
    before = lower.graphs_compiled()
    torch.compile(lambda x: x + 1, backend="eager")(torch.ones(1))
    assert lower.graphs_compiled() == before + 1
    torch.compiler.reset()
    assert lower.graphs_compiled() == before + 1


def test_rules_trace_on_a_symbolic_length() -> None:
    traced = trace(signature())
    sizes = [node.meta["val"].shape for node in traced.graph.graph.nodes if node.op == "placeholder"]
    assert all(isinstance(shape[0], torch.SymInt) for shape in sizes[:4]), "the length was specialised"
    assert sum(node.target is torch.ops.aten.copy_.default for node in traced.graph.graph.nodes) == 3


def test_inductor_makes_one_serial_loop_and_its_arguments_are_found() -> None:
    lowered = lower.lower_cpp(trace(signature()))
    assert lowered.source.count("void") >= 1
    assert "kernel(" in lowered.source, "the kernel is no longer named kernel"
    assert "#pragma omp" not in lowered.source, "cpp.threads=1 no longer makes a serial loop"
    assert "Vectorized" in lowered.source, "the loop is no longer vectorised"
    assert lowered.arguments.count(None) == 1, "the length is no longer one argument"
    assert {i for i in lowered.arguments if i is not None} == set(range(4 + len(signature().scalars)))
    assert "inductor_cpu_integer_div_error_flag" in lowered.source, "launch/source.py renames this flag"


def test_flags_name_headers_that_exist() -> None:
    flags = lower.cpp_flags()
    includes = [flag[2:] for flag in flags if flag.startswith("-I")]
    assert any("CPU_CAPABILITY" in flag for flag in flags)
    assert includes
    assert (kernels.Path(includes[0]) / "torch/csrc/inductor/cpp_prefix.h").is_file()


def test_line_search_takes_and_returns_what_lbfgs_expects() -> None:
    x, d = [torch.tensor([3.0])], torch.tensor([-6.0])
    parameters = list(inspect.signature(lower.strong_wolfe).parameters)
    assert parameters[:7] == ["obj_func", "x", "t", "d", "f", "g", "gtd"]
    assert "max_ls" in parameters

    def evaluate(x: list[torch.Tensor], t: float, d: torch.Tensor) -> tuple[float, torch.Tensor]:
        at = x[0] + t * d
        return at.square().sum().item(), 2 * at

    loss, g, t, calls = lower.strong_wolfe(evaluate, x, 1.0, d, 9.0, -d, -(d @ d), max_ls=25)
    assert (loss, g.item(), float(t)) == pytest.approx((0.0, 0.0, 0.5), abs=1e-6)
    assert calls > 1


def test_flatten_and_unflatten() -> None:
    tensors = [torch.randn(2, 3), torch.randn(()), torch.randn(4)]
    flat = lower.flatten(tensors)
    assert flat.shape == (11,)
    assert all(torch.equal(a, b) for a, b in zip(lower.unflatten(flat, tensors), tensors, strict=True))


def test_tensors_are_laid_out_as_the_host_module_expects() -> None:
    host = kernels.host_module()  # its start() compares the layout and raises
    sample = torch.empty(2, 7, dtype=torch.float64)
    with pytest.raises(ImportError, match="lays out its tensors"):
        host.start(torch.Tensor, torch.nn.Parameter, sample, sample.data_ptr() + 8)
    host.start(torch.Tensor, torch.nn.Parameter, sample, sample.data_ptr())
    assert host.refusal(sample) is None
    assert host.matches(sample, torch.empty(2, 7, dtype=torch.float64))
    assert not host.matches(sample, torch.empty(7, 2, dtype=torch.float64).t())
