"""What the host module hands to a kernel that reads counts, hyperparameters and sparse rows where they lie."""

from __future__ import annotations

import ctypes
from typing import Any

import pytest
import torch
from torch import Tensor

from compiled_optim._engine.kernels import registry

Entry = ctypes.CFUNCTYPE(
    None,
    ctypes.c_int64,
    *(ctypes.POINTER(t) for t in (ctypes.c_size_t, ctypes.c_int64, ctypes.c_int32, ctypes.c_double, ctypes.c_size_t)),
    ctypes.c_int64,
    ctypes.c_size_t,
)


class Recorder:
    """A plan with one launch per call of `add`, and what its kernels were handed in the last step."""

    def __init__(self, counts: int = 1) -> None:
        self.host = registry.host_module()
        self.slots = (*("step", "carried")[:counts], "moment")
        self.plan = self.host.make(self.slots, counts)
        self.counts = counts
        self.state: dict[Tensor, dict[str, Tensor]] = {}
        self.lists: list[list[Tensor]] = []
        self.calls: list[dict[str, Any]] = []
        self._entries: list[Any] = []

    def add(self, params: list[Tensor], **flags: bool) -> None:
        """A launch and a param group of these."""
        cells = 3 + 3 * flags.get("by_rows", False) + self.counts * flags.get("on_device", False)

        def entry(tensors: int, table: Any, begins: Any, rows: Any, scalars: Any, addresses: Any, columns: int, _: int):
            used = [row if row >= 0 else ~row for row in rows[:tensors]]
            self.calls.append(
                {
                    "table": [table[t * cells : (t + 1) * cells] for t in range(tensors)],
                    "begins": begins[: tensors + 1],
                    "rows": rows[:tensors],
                    "scalars": [scalars[row * columns : (row + 1) * columns] for row in used],
                    "addresses": [[addresses[row * columns + c] or 0 for c in range(columns)] for row in used],
                }
            )

        self._entries.append(Entry(entry))
        for p in params:
            counts = {name: torch.zeros((), dtype=torch.float32) for name in self.slots[: self.counts]}
            self.state[p] = {**counts, "moment": torch.zeros_like(p)}
        address = ctypes.cast(self._entries[-1], ctypes.c_void_p).value
        options = [flags.get(name, False) for name in ("on_device", "by_rows", "scaled")]
        samples = {self.counts: self.state[params[0]]["moment"]}
        self.host.add_launch(self.plan, address, params[0], samples, 1 << 62, *options)
        self.host.add_group(self.plan, [(p, len(self.lists), True) for p in params])
        self.lists.append(params)

    def run(self, rows: list[Any], substitutes: list[Any] | None = None) -> Any:
        self.calls.clear()
        contexts = (0,) * len(self._entries)
        return self.host.run(self.plan, tuple(self.lists), self.state, rows, substitutes or [], contexts)

    def seal(self) -> None:
        self.host.seal(self.plan, self.state)


def parameter(*shape: int) -> Tensor:
    p = torch.zeros(shape)
    p.grad = torch.ones(shape)
    return p


def tagged(t: Tensor) -> int:
    return t.data_ptr() + (t.dtype == torch.float32)


def test_numbers_on_the_device_are_handed_over_as_addresses() -> None:
    run = Recorder()
    p, q = parameter(3), parameter(2)
    run.add([p, q], on_device=True)
    run.seal()
    run.state[q]["step"] = torch.tensor([torch.nan], dtype=torch.float64)
    assert run.run([]) == [(-1, (0.0,))]
    lr, decay, found_inf = torch.tensor(0.5), torch.tensor([0.25], dtype=torch.float64), torch.zeros(1)
    watched = (p, run.state[p]["step"], p.grad)
    versions = [t._version for t in watched]
    assert run.run([(-1, (0.0,), (lr, 7, torch.nn.Parameter(decay), found_inf))]) is None
    assert run.calls == [
        {
            "table": [
                [t.data_ptr(), t.grad.data_ptr(), run.state[t]["moment"].data_ptr(), tagged(run.state[t]["step"])]
                for t in (p, q)
            ],
            "begins": [0, 3, 5],
            "rows": [0, 0],
            "scalars": [[0, 7, 0, 0]] * 2,
            "addresses": [[tagged(lr), 0, tagged(decay), tagged(found_inf)]] * 2,
        }
    ]
    assert run.state[p]["step"] == 0  # the kernel's to advance
    assert [t._version - v for t, v in zip(watched, versions, strict=True)] == [1, 1, 0]


@pytest.mark.parametrize(
    "value",
    [torch.tensor(1), torch.ones(2), torch.ones((), dtype=torch.bfloat16), torch.ones((), device="meta"), "x"],
    ids=str,
)
def test_other_objects_are_no_numbers(value: Any) -> None:
    run = Recorder()
    run.add([parameter(3)], on_device=True)
    run.seal()
    assert run.run([(-1, (0.0,), (value, 0.0))]) is False


def test_a_tensor_is_no_number_where_the_host_counts() -> None:
    run = Recorder()
    run.add([parameter(3)])
    run.seal()
    assert run.run([(0, (1.0,), (torch.tensor(0.5),))]) is False


def test_a_storage_that_is_too_short_is_not_read() -> None:
    run = Recorder()
    run.add([parameter(3)], on_device=True)
    run.seal()
    lr = torch.tensor(0.5)
    lr.untyped_storage().resize_(0)
    assert run.run([(-1, (0.0,), (lr, 0.0))]) is False


def test_rows_of_other_launches_and_groups_may_be_longer() -> None:
    run = Recorder(counts=2)
    params = [parameter(2) for _ in range(3)]
    run.add(params[:1])
    run.add(params[1:2], on_device=True)
    run.add(params[2:])
    run.seal()
    run.state[params[2]]["step"].fill_(4)
    codes = -1 - (1 * 3 + 1)
    wanted = [(0, (1.0, 0.0)), (codes, (0.0, 0.0)), (2, (5.0, 0.0))]
    assert run.run([]) == wanted
    values = [(0.5, 11.0), (1.0, 2.0, 3.0, 4.0), (12.0,)]
    assert run.run([(*row, v) for row, v in zip(wanted, values, strict=True)]) is None
    assert [call["scalars"] for call in run.calls] == [[[0.5, 11, 0, 0]], [[1, 2, 3, 4]], [[12, 0, 0, 0]]]
    counted = [[run.state[p][name].item() for name in ("step", "carried")] for p in params]
    assert counted == [[1, 11], [0, 0], [5, 12]]
    with pytest.raises(ValueError, match="a row must have 1 recurrent scalars, got 0 values"):
        run.run([(0, (2.0, 11.0), ())])


def test_a_step_without_counts_is_the_first_or_a_later_one() -> None:
    run = Recorder(counts=0)
    p, q = parameter(2), parameter(2)
    run.add([p, q], on_device=True)
    run.seal()
    q.grad = None
    assert run.run([(-1, (1.0,), (0.0,))]) is None
    q.grad = torch.ones(2)
    assert run.run([]) == [(-1, (2.0,)), (-1, (1.0,))]
    assert run.run([(-1, (2.0,), (2.0, 0.0)), (-1, (1.0,), (1.0, 0.0))]) is None
    assert run.calls[0]["scalars"] == [[2, 0], [1, 0]]
    assert run.run([]) == [(-1, (2.0,))]


def test_counts_of_two_parameters_cannot_be_one_where_a_kernel_advances_them() -> None:
    run = Recorder()
    p, q = parameter(2), parameter(2)
    run.add([p, q], on_device=True)
    run.seal()
    run.state[q]["step"] = run.state[p]["step"]
    assert run.run([]) == "tensors came to share memory"


def test_a_count_of_another_device_makes_a_plan_stale() -> None:
    run = Recorder()
    p = parameter(2)
    run.add([p], on_device=True)
    run.seal()
    run.state[p]["step"] = torch.zeros((), device="meta")
    assert run.run([]) == "a step count changed"


def test_touched_rows_are_handed_over_as_they_are() -> None:
    run = Recorder()
    p = parameter(2, 3, 4)
    run.add([p], on_device=True, by_rows=True)
    run.seal()
    assert run.run([]) == "a gradient became dense"
    for values, rows in ((torch.ones(2, 3, 4), [1, 0]), (torch.ones(1, 4), [5]), (torch.ones(0), [])):
        index = torch.tensor(rows, dtype=torch.int64)
        assert run.run([(-1, (0.0,), (0.0,))], [(p, values, index)]) is None
        width = values.shape[1:].numel()
        (row,) = run.calls[0]["table"]
        assert row[1:2] + row[3:] == [
            values.data_ptr(),
            index.data_ptr(),
            width,
            24 // width,
            tagged(run.state[p]["step"]),
        ]
        assert run.calls[0]["begins"] == [0, len(rows) * width]
    for values, index in (
        (torch.ones(2, 3, 4), torch.tensor([[1, 0]])),
        (torch.ones(2, 3, 4), torch.tensor([1])),
        (torch.ones(2, 3, 4), torch.tensor([1.0, 0.0])),
        (torch.ones(2, 4, 3), torch.tensor([1, 0])),
        (torch.ones(1, 1, 2, 3, 4), torch.tensor([0])),
        (torch.ones(2, 3, 8)[..., ::2], torch.tensor([1, 0])),
        (torch.ones(2, 3, 4), torch.tensor([1, 5, 0, 5])[::2]),
    ):
        assert run.run([], [(p, values, index)]) == "a gradient changed its layout or dtype"


def test_a_kernel_may_write_to_gradients() -> None:
    run = Recorder()
    p = parameter(2)
    p.grad = torch.ones(2)
    lazy = torch._lazy_clone(p.grad)
    run.add([p], on_device=True, scaled=True)
    run.seal()
    before = p.grad._version
    assert run.run([(-1, (0.0,), (0.0,))]) is None
    assert p.grad._version == before + 1
    written = run.calls[0]["table"][0][1]
    assert written == p.grad.data_ptr() != torch._C._data_address(lazy)
