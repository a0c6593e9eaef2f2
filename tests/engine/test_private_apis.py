"""What compiled_optim takes from torch's private parts, one test each: a failure here says which upstream change broke.

Everything private is used in compiled_optim/_engine/torch_private/, and by kernels/host/tensors.h.
"""

from __future__ import annotations

import functools
import inspect
from dataclasses import replace
from types import FunctionType
from typing import Any

import pytest
import torch
import torch._dynamo.eval_frame
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from compiled_optim._engine.kernels import registry
from compiled_optim._engine.kernels.trace import Signature, trace
from compiled_optim._engine.torch_private import (
    absent_gpu,
    backward,
    cpu,
    dynamo,
    inductor,
    modules,
    optim,
    tensor_parts,
    version,
)
from compiled_optim.algorithms import AdamW
from compiled_optim.testing import assert_compiles


def signature() -> Signature:
    choice = AdamW.rule.declaration.read(AdamW.rule.declaration.check({}))
    scalars = tuple(AdamW.scalars(choice.hyper, 1))
    return Signature(AdamW.rule, choice.switches, (torch.float32,) * 3, ("exp_avg", "exp_avg_sq"), scalars)


def test_version_is_in_the_range_that_was_checked() -> None:
    assert version.unsupported_version() is None


@pytest.mark.parametrize("other", ["2.10.0", "2.16.0+cpu", "3.0.0a0"])
def test_other_versions_are_refused(other: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", other)
    assert other in (version.unsupported_version() or "")


def test_optimizer_methods_are_wrapped_so_that_they_unwrap() -> None:
    for name in ("add_param_group", "state_dict", "load_state_dict", "zero_grad"):
        method = getattr(torch.optim.Optimizer, name)
        assert inspect.unwrap(method).__module__ == "torch.optim.optimizer"
        assert inspect.unwrap(method) is not method, f"Optimizer.{name} is no longer decorated: call it as it is"


def test_hooks_of_optimizers_are_where_they_were() -> None:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)])
    assert not optim.step_is_observed(optimizer)
    handle = register_optimizer_step_pre_hook(lambda *_: None)
    assert optim.step_is_observed(optimizer)
    handle.remove()
    optimizer.register_step_post_hook(lambda *_: None)
    assert optim.step_is_observed(optimizer)
    assert callable(torch.optim.Optimizer.profile_hook_step)


def test_a_quick_step_finds_hooks_and_switches_where_they_were() -> None:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)])

    def hooks() -> list[Any]:
        return [vars(optimizer)[it] if isinstance(it, str) else it for it in optim.HOOKS]

    assert not any(hooks())
    handles = [register_optimizer_step_pre_hook(print), register_optimizer_step_post_hook(print)]
    handles += [optimizer.register_step_pre_hook(print), optimizer.register_step_post_hook(print)]
    assert all(hooks())
    for handle in handles:
        handle.remove()
    for found, key, *attributes, value in dynamo.watched():
        found = found[key]
        for name in attributes:
            found = getattr(found, name)
        assert found is value, f"{key} is not {value}: quick steps are none"


def test_modules_keep_what_they_hold_in_plain_dicts() -> None:
    module = torch.nn.Sequential(torch.nn.BatchNorm1d(3), torch.nn.Linear(3, 1))
    norm = vars(module[0])
    assert [type(vars(m)[name]) for m in module.modules() for name in modules.HELD] == [dict] * 9
    assert [list(norm[name]) for name in modules.HELD[:2]] == [
        [name for name, _ in module[0].named_parameters()],
        [name for name, _ in module[0].named_buffers()],
    ]
    assert [*vars(module)[modules.HELD[2]].values()] == [*module.children()]
    assert modules.tensors(module) == ([*module.parameters()], [*module.buffers()])


def test_profiler_state_can_be_asked() -> None:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)])
    with torch.autograd.profiler.profile():
        assert optim.step_is_observed(optimizer)
    assert not optim.step_is_observed(optimizer)


def test_stance_is_where_it_was() -> None:
    assert dynamo.compiling_disabled() is None
    with torch.compiler.set_stance("force_eager"):
        assert "force_eager" in (dynamo.compiling_disabled() or "")
    assert dynamo.compiling_disabled() is None


def test_a_function_runs_outside_graphs_and_its_closure_is_compiled() -> None:
    seen = []

    def inside(x: torch.Tensor, closure: Any) -> Any:
        seen.append((torch.compiler.is_compiling(), dynamo.compiles_frames()))
        return closure(x) + 1

    outside = dynamo.outside_graphs(inside)
    compiled = torch.compile(lambda x: outside(x * 2, lambda y: y * 5) * 3, backend="eager")
    with assert_compiles(graphs=3):
        assert compiled(torch.ones(1)).item() == 33
    assert seen == [(False, False)]
    assert not dynamo.compiles_frames()


def note(seen: list[Any], p: torch.Tensor) -> None:
    seen.append(torch.compiler.is_compiling())


@pytest.mark.parametrize("decorate", [lambda function: function, dynamo.skipped], ids=["plain", "skipped"])
def test_what_a_compiled_function_calls_outside_of_its_graphs_can_be_skipped(decorate: Any) -> None:
    seen: list[bool] = []
    p = torch.ones(2, requires_grad=True)
    hook = decorate(FunctionType(note.__code__.replace(), globals()))
    p.register_post_accumulate_grad_hook(functools.partial(hook, seen))  # type: ignore[no-untyped-call]

    @torch.compile(backend="eager")
    def compiled() -> None:
        torch.autograd.backward(p.square().sum())

    compiled()
    assert seen == [decorate is not dynamo.skipped]


def test_a_backward_pass_has_a_number_and_tells_its_end() -> None:
    p = torch.ones(2, requires_grad=True)
    seen: list[Any] = []

    def hook(p: Any) -> None:
        seen.append(backward.backward_pass())
        backward.at_its_end(lambda: seen.append([backward.backward_pass(), p.grad.tolist()]))

    p.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]
    assert backward.backward_pass() == -1
    for _ in range(2):
        p.sum().backward()  # type: ignore[no-untyped-call]
    first, second = seen[0], seen[2]
    assert 0 <= first < second
    assert seen == [first, [first, [1, 1]], second, [second, [2, 2]]]


class Owner(torch.optim.SGD):
    """An optimizer that is asked about while a graph is traced."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, lr=0.1)
        self.answers: list[Any] = []

    @dynamo.constant_in_graphs
    def ask(self) -> int:
        dynamo.join_trace(type(self))
        params = self.param_groups[0]["params"]
        self.answers.append((dynamo.gradients_are_traced(params), dynamo.change_is_pending([self.param_groups[0]])))
        return len(self.answers)


def test_what_a_trace_is_asked() -> None:
    """An optimizer is traced as any object, and its real methods are called while that happens."""
    owners = [Owner([torch.ones(2, requires_grad=True)]) for _ in range(2)]

    def asked(owner: Owner, x: torch.Tensor) -> torch.Tensor:
        count = owner.ask()
        owner.param_groups[0]["lr"] = 0.5
        for p in owner.param_groups[0]["params"]:
            p.grad = x
        return x * (count + owner.ask())

    compiled = torch.compile(asked, backend="eager", fullgraph=True)
    assert compiled(owners[0], torch.ones(2)).tolist() == [3, 3]
    assert owners[0].answers == [(False, False), (True, True)]
    with assert_compiles(0):
        assert compiled(owners[1], torch.ones(2)).tolist() == [3, 3]
    assert owners[1].answers == []


def test_constants_that_graphs_share_carry_no_source_over() -> None:
    """Where one of them has a source, Dynamo reads it there; in another graph there stands something else."""
    from torch._dynamo.source import ConstantSource
    from torch._dynamo.variables.constant import ConstantVariable

    if version.torch_version() == (2, 11):
        assert ConstantVariable.create(None) is not ConstantVariable.create(None)
        pytest.skip("each graph has its own None: nothing to do")
    assert ConstantVariable.create(None) is ConstantVariable.create(None), "each graph has its own None: nothing to do"
    ConstantVariable.create(None).source = ConstantSource("of another graph")
    owner = Owner([torch.ones(2, requires_grad=True)])
    torch.compile(lambda owner, x: x * owner.ask(), backend="eager")(owner, torch.ones(1))
    assert ConstantVariable.create(None).source is None


def test_static_addresses_are_marked_as_torch_marks_them() -> None:
    ours, stock = torch.ones(1), torch.ones(1)
    dynamo.mark_static([ours])
    torch._dynamo.mark_static_address(stock, guard=False)
    assert vars(ours) == vars(stock)


def test_dynamo_counts_its_graphs() -> None:
    before = dynamo.graphs_compiled()
    torch.compile(lambda x: x + 1, backend="eager")(torch.ones(1))
    assert dynamo.graphs_compiled() == before + 1
    torch.compiler.reset()
    assert dynamo.graphs_compiled() == before + 1


def test_rules_trace_on_a_symbolic_length() -> None:
    traced = trace(signature())
    sizes = [node.meta["val"].shape for node in traced.graph.graph.nodes if node.op == "placeholder"]
    assert all(isinstance(shape[0], torch.SymInt) for shape in sizes[:4]), "the length was specialised"
    assert sum(node.target is torch.ops.aten.copy_.default for node in traced.graph.graph.nodes) == 3


def test_what_writes_in_place_is_traced_without_writes() -> None:
    def lerp(p: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
        new = p.clone()
        torch._foreach_lerp_([new], [g], 0.25)
        return new

    def body(p: torch.Tensor, g: torch.Tensor) -> list[torch.Tensor]:
        return [inductor.WithoutWrites(lerp)(p, g)]

    graph, _, _ = inductor.trace_flat(body, [torch.float32] * 2, [], "cpu")
    assert not [n for n in graph.graph.nodes if "_." in str(n.target)]
    torch.testing.assert_close(graph(torch.zeros(3), torch.ones(3)), [torch.full((3,), 0.25)])


def test_inductor_makes_one_serial_loop_and_its_arguments_are_found() -> None:
    lowered = inductor.lower_cpp(trace(signature()))
    assert lowered.source.count("void") >= 1
    assert "kernel(" in lowered.source, "the kernel is no longer named kernel"
    assert "#pragma omp" not in lowered.source, "cpp.threads=1 no longer makes a serial loop"
    assert "Vectorized" in lowered.source, "the loop is no longer vectorised"
    assert lowered.arguments.count(None) == 1, "the length is no longer one argument"
    assert {i for i in lowered.arguments if i is not None} == set(range(4 + len(signature().scalars)))
    has_flag = version.torch_version() >= (2, 13)
    assert ("inductor_cpu_integer_div_error_flag" in lowered.source) == has_flag, "backends/cpu.py renames this flag"


def test_loops_fill_registers_of_the_narrowest_dtype() -> None:
    mixed = replace(signature(), dtypes=(torch.float32, torch.bfloat16, torch.bfloat16))
    source = inductor.lower_cpp(trace(mixed)).source
    assert "VectorizedN<float,2>" in source, "TilingSelect.select_tiling no longer says how many elements a loop takes"
    if torch.backends.cpu.get_cpu_capability().startswith("AVX"):
        assert source.count("widened(") == 4, "CppVecKernel.get_to_dtype_expr no longer converts what is loaded"
        assert source.count("rounded(") == 4, "CppVecKernel.get_to_dtype_expr no longer converts what is stored"


def test_flags_name_headers_that_exist() -> None:
    flags = inductor.cpp_flags()
    includes = [flag[2:] for flag in flags if flag.startswith("-I")]
    assert any("CPU_CAPABILITY" in flag for flag in flags)
    assert includes
    assert (registry.Path(includes[0]) / "torch/csrc/inductor/cpp_prefix.h").is_file()


def test_dynamo_compiles_under_its_lock() -> None:
    from torch._dynamo import convert_frame

    held = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        held.append((inductor.holds_dynamo(), convert_frame.compile_lock._is_owned()))
        return graph.forward

    torch.compile(lambda x: x + 7, backend=backend)(torch.ones(1))
    assert held == [(True, True)]
    assert not inductor.holds_dynamo()


def test_lowering_compiles_nothing_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inductor's wrapper imports AsyncCompile from where it is replaced."""
    from torch._inductor.async_compile import AsyncCompile

    monkeypatch.setattr(AsyncCompile, "__init__", lambda self: pytest.fail("Inductor's own compiler is used"))
    assert "AsyncCompile" in inspect.getsource(inspect.getmodule(AsyncCompile))  # type: ignore[arg-type]
    inductor.lower_cpp(trace(signature()))


def test_a_gpu_is_pretended_although_inductor_knows_that_there_is_none() -> None:
    triton = pytest.importorskip("torch.utils._triton")
    known = triton.has_triton()
    with absent_gpu.pretend(90):
        assert triton.has_triton()
    assert triton.has_triton() == known


def test_line_search_takes_and_returns_what_lbfgs_expects() -> None:
    x, d = [torch.tensor([3.0])], torch.tensor([-6.0])
    parameters = list(inspect.signature(optim.strong_wolfe).parameters)
    assert parameters[:7] == ["obj_func", "x", "t", "d", "f", "g", "gtd"]
    assert "max_ls" in parameters

    def evaluate(x: list[torch.Tensor], t: float, d: torch.Tensor) -> tuple[float, torch.Tensor]:
        at = x[0] + t * d
        return at.square().sum().item(), 2 * at

    loss, g, t, calls = optim.strong_wolfe(evaluate, x, 1.0, d, 9.0, -d, -(d @ d), max_ls=25)
    assert (loss, g.item(), float(t)) == pytest.approx((0.0, 0.0, 0.5), abs=1e-6)
    assert calls > 1


def test_shards_of_dtensors_are_where_they_were(mesh: Any) -> None:
    from torch.distributed._functional_collectives import AsyncCollectiveTensor
    from torch.distributed.tensor import Replicate, distribute_tensor

    p: Any = torch.nn.Parameter(distribute_tensor(torch.ones(3), mesh, [Replicate()]))
    assert tensor_parts.is_dtensor(p)
    assert not tensor_parts.is_dtensor(torch.nn.Parameter(torch.ones(3)))
    shard = tensor_parts.local_shard(p)
    assert type(shard) is torch.Tensor
    assert shard.data_ptr() == p.to_local().data_ptr()
    assert tensor_parts.local_shard(p) is shard, "plans are made again in every step"
    p._local_tensor = AsyncCollectiveTensor(torch.full((3,), 2.0))
    shard = tensor_parts.local_shard(p)
    assert type(shard) is torch.Tensor
    assert shard.tolist() == [2, 2, 2]


def test_fake_tensors_are_told_apart() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    assert tensor_parts.is_fake(FakeTensorMode().from_tensor(torch.ones(3))), "their class has moved"
    assert not tensor_parts.is_fake(torch.ones(3, device="meta"))


def test_unflatten() -> None:
    tensors = [torch.randn(2, 3), torch.randn(()), torch.randn(4)]
    flat = torch.cat([t.reshape(-1) for t in tensors])
    assert all(torch.equal(a, b) for a, b in zip(tensor_parts.unflatten(flat, tensors), tensors, strict=True))


def test_tensors_are_laid_out_as_the_host_module_expects() -> None:
    host = registry.host_module()  # its start() compares the layout and raises
    sample = torch.empty(2, 7, dtype=torch.float64)
    with pytest.raises(ImportError, match="lays out its tensors"):
        host.start(torch.Tensor, torch.nn.Parameter, sample, sample.data_ptr() + 8)
    host.start(torch.Tensor, torch.nn.Parameter, sample, sample.data_ptr())
    assert host.refusal(sample) is None
    assert host.matches(sample, torch.empty(2, 7, dtype=torch.float64))
    assert not host.matches(sample, torch.empty(7, 2, dtype=torch.float64).t())


def test_torch_says_whether_the_cpu_multiplies_bfloat16() -> None:
    assert isinstance(torch.cpu._is_avx512_bf16_supported(), bool)
    assert cpu.multiplies_bfloat16() == torch.cpu._is_avx512_bf16_supported()
