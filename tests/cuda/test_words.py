"""What a launch on a GPU is handed: the words in its buffer, which of them are sent, and how it is cut into chunks."""

from __future__ import annotations

import ctypes
import itertools
import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import stand_in
import torch
from torch import Tensor

from compiled_optim._engine.kernels import registry
from compiled_optim._engine.kernels.backends import cuda_launch

interpreted = pytest.importorskip("interpreted", exc_type=ImportError)  # which needs Triton, as do the next
stand_in_gpu = pytest.importorskip("stand_in_gpu")
nvidia = pytest.importorskip("triton.backends.nvidia")
stand_in.register()
ON_GPU = stand_in.DEVICES[0]
BLOCK = 4
MOST_CHUNKS = 16384


@pytest.fixture(autouse=True)
def driver(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The stand-in, on which kernels do nothing but `write`."""
    monkeypatch.setattr(interpreted, "run", lambda *_: None)
    driver = stand_in_gpu.driver()
    driver.reset()
    yield driver
    assert driver.error is None


def _native() -> cuda_launch.Driver:
    return cuda_launch.driver(stand_in_gpu.driver().name)


class Run:
    """A plan with one launch of parameters with one buffer, whose words lie in ``buffer``.

    Args:
        counts: how many counts each parameter has. They lie on its device if there are ``hypers``, which is how many.
        scalars: how many each tensor has, in ``dtype``.
        factor: which of these has an address of its own.
    """

    def __init__(
        self,
        params: list[Tensor],
        *,
        counts: int = 1,
        scalars: int = 3,
        dtype: torch.dtype = torch.float32,
        hypers: int | None = None,
        factor: int = -1,
        by_rows: bool = False,
        native: cuda_launch.Driver | None = None,
    ) -> None:
        self.driver, native = stand_in_gpu.driver(), native or _native()
        kernels = [self._kernel(native, name) for name in ("update", *(["prologue"] if hypers is not None else []))]
        self.host, self.params = registry.host_module(), params
        self.slots = (*("step", "carried")[:counts], "moment")
        self.on_device, self.scalars, self.dtype = hypers is not None, scalars, dtype
        self.hypers = hypers or 0
        self.stride = 5 + 3 * by_rows + (counts + 1 if self.on_device else factor >= 0)
        self.cells = 3 + 3 * by_rows + counts * self.on_device
        self.form = cuda_launch.Form(
            update=kernels[0], prologue=kernels[1] if self.on_device else 0, device=0, flat=3, cells=self.cells,
            scalars=scalars, scalar_bytes=dtype.itemsize, factor=factor, counts=counts * self.on_device,
            hypers=self.hypers, block=BLOCK, threads=128, shared=0, prologue_shared=0,
        )  # fmt: skip
        handle = native.call("launch_make", ctypes.c_void_p(native.handle), ctypes.byref(self.form))
        self.functions, self.handle = native.functions, ctypes.c_void_p(handle)
        self.plan = self.host.make(self.slots, counts)
        where = params[0].device if self.on_device else "cpu"
        self.state = {}
        for p in params:
            numbers = {name: torch.zeros((), device=where) for name in self.slots[:counts]}
            self.state[p] = {**numbers, "moment": torch.zeros_like(p)}
        entry = ctypes.cast(native.functions.entry, ctypes.c_void_p).value
        flags = (self.on_device, by_rows, False)
        samples = {counts: self.state[params[0]]["moment"]}
        self.host.add_launch(self.plan, entry, params[0], samples, 1 << 62, *flags)
        self.host.add_group(self.plan, [(p, 0, False) for p in params])
        self.host.seal(self.plan, self.state)
        self.step_is(torch.full((self.capacity(len(params)),), -1))

    def __del__(self) -> None:
        self.functions.launch_drop(self.handle)

    @staticmethod
    def _kernel(native: cuda_launch.Driver, name: str) -> int:
        image = json.dumps([name, "", BLOCK]).encode()
        return native.call("kernel_load", ctypes.c_void_p(native.handle), image, name.encode())

    def capacity(self, tensors: int) -> int:
        return int(self.functions.launch_capacity(self.handle, ctypes.c_int64(tensors)))

    def step_is(self, buffer: Tensor, *, stream: int = 7, capturing: bool = False, factor: int = 0) -> None:
        """What the next steps are told."""
        self.buffer = buffer
        self.step = cuda_launch.Step(self.handle.value, stream, buffer.data_ptr(), len(buffer), factor, capturing)

    def __call__(self, *values: tuple[Any, ...], substitutes: Any = ()) -> list[Any]:
        """A step with a row of values for each that is asked for, and what it launched."""
        self.driver.reset()
        arguments = (self.plan, (self.params,), self.state)
        rest = (list(substitutes), (ctypes.addressof(self.step),))
        wanted = self.host.run(*arguments, [], *rest)
        if wanted is not None:
            assert isinstance(wanted, list), wanted
            rows = [(*row, v) for row, v in zip(wanted, itertools.cycle(values), strict=False)]
            outcome = self.host.run(*arguments, rows, *rest)
            assert outcome is None, outcome
        return self.driver.launches

    def rows(self) -> list[dict[str, Any]]:
        """What the kernels read of each tensor, in the table of the last launch."""
        update = self.driver.launches[-1]
        found = []
        for t in range(update.values["sizes"] - update.values["table"] >> 3):
            if (t + 1) * self.stride * 8 > update.values["sizes"] - update.values["table"]:
                break
            words = numbers(update.values["table"] + t * self.stride * 8, ctypes.c_int64, self.stride)
            kind = ctypes.c_float if self.dtype == torch.float32 else ctypes.c_double
            found.append(
                {
                    "flat": words[:3],
                    "scalars": words[3] if self.on_device else numbers(words[3], kind, self.scalars),
                    "skip": numbers(words[4], ctypes.c_float, 1)[0],
                    "more": words[5 : 2 + self.cells],
                    "last": words[-1],
                    "hypers": [number(a) for a in numbers(words[-1], ctypes.c_int64, self.hypers)],
                }
            )
        return found


def numbers(address: int, kind: Any, count: int) -> list[Any]:
    return list((kind * count).from_address(address))


def number(tagged: int) -> float:
    """The float32 or float64 at an address, as a prologue reads it."""
    return numbers(tagged & ~1, ctypes.c_float if tagged & 1 else ctypes.c_double, 1)[0]


def tagged(t: Tensor) -> int:
    return t.data_ptr() + (t.dtype == torch.float32)


def parameter(*shape: int, device: torch.device | str = "cpu") -> Tensor:
    p = torch.zeros(shape, device=device)
    p.grad = torch.ones(shape, device=device)
    return p


def written(launches: list[Any]) -> list[tuple[int, int]]:
    """From where to where words were sent, addresses."""
    sent = [launch.values for launch in launches if launch.kernel == "write"]
    return [(values["to"], values["to"] + len(values["words"])) for values in sent]


# ---- the words


@pytest.mark.parametrize("scalars", [0, 1, 3, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_scalars_of_the_host(dtype: torch.dtype, scalars: int) -> None:
    params = [parameter(n) for n in (3, 1, 7)]
    run = Run(params, dtype=dtype, scalars=scalars)
    run.state[params[1]]["step"].fill_(5)
    values = [tuple(0.1 * i + k for i in range(scalars)) for k in range(2)]
    launches = run(*values)
    assert [launch.kernel for launch in launches][-1] == "update"
    assert launches[-1].stream == 7
    for p, row, k in zip(params, run.rows(), (0, 1, 0), strict=True):
        assert row["flat"] == [p.data_ptr(), p.grad.data_ptr(), run.state[p]["moment"].data_ptr()]
        assert row["scalars"] == torch.tensor(values[k], dtype=dtype).tolist()
        assert row["skip"] == 0
    assert [run.state[p]["step"].item() for p in params] == [1, 6, 1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_factor_with_an_address_of_its_own(dtype: torch.dtype) -> None:
    """The host's is among the scalars; that of the device is where the step says."""
    params = [parameter(n) for n in (3, 1, 7)]
    run = Run(params, dtype=dtype, factor=1)
    run.state[params[1]]["step"].fill_(5)
    kind = ctypes.c_float if dtype == torch.float32 else ctypes.c_double
    run((1.0, 0.25, 3.0), (4.0, 0.5, 6.0))
    assert [numbers(row["last"], kind, 1)[0] for row in run.rows()] == [0.25, 0.5, 0.25]
    factor = torch.tensor(0.125, dtype=dtype)
    run.step_is(run.buffer, factor=factor.data_ptr())
    for changed in (True, False):
        assert bool(written(run((1.0, 0.25, 3.0), (4.0, 0.5, 6.0)))) == changed
        assert [row["last"] for row in run.rows()] == [factor.data_ptr()] * 3


def test_numbers_on_the_device() -> None:
    params = [parameter(n, device=ON_GPU) for n in (3, 0, 70)] + [parameter(2, device=ON_GPU) for _ in range(40)]
    run = Run(params, counts=2, hypers=3, scalars=3)
    lr, decay = torch.tensor(0.5, device=ON_GPU), torch.tensor([0.25], dtype=torch.float64, device=ON_GPU)
    found_inf = torch.zeros(1, device=ON_GPU)
    with stand_in.no_waiting():
        launches = run((lr, 0.1, decay, found_inf))
    assert [launch.kernel for launch in launches[-2:]] == ["prologue", "update"]
    prologue, update = launches[-2:]
    assert prologue.grid == (1, 2, 1)
    assert prologue.values["tensors"] == 43
    for p, row in zip(params, run.rows(), strict=True):
        assert row["hypers"] == [0.5, 0.1, 0.25]
        assert row["more"] == [tagged(run.state[p][name]) for name in ("step", "carried")]
        assert row["skip"] == 0
    # what the prologue writes lies behind the words that are sent, each tensor's apart
    places = [row["scalars"] for row in run.rows()]
    assert places[0] >= update.values["tensor_of"] + 4 * update.values["chunks"]
    assert [b - a for a, b in itertools.pairwise(places)] == [16] * 42
    assert prologue.values["numbers"] == places[-1] + 16
    assert prologue.values["numbers"] + 43 * 5 * 8 <= run.buffer.data_ptr() + 8 * len(run.buffer)
    lr.fill_(2)
    found_inf.fill_(1)
    assert not written(run((lr, 0.1, decay, found_inf)))
    assert [(row["hypers"][0], row["skip"]) for row in run.rows()] == [(2, 1)] * 43
    for value, skip in ((1.0, 1), (0.0, 0)):
        run((lr, 0.1, decay, value))
        assert {row["skip"] for row in run.rows()} == {skip}
    with pytest.raises(RuntimeError, match="found_inf must be a float32 tensor, got float64"):
        run((lr, 0.1, decay, found_inf.double()))


def test_touched_rows() -> None:
    p = parameter(5, 6, device=ON_GPU)
    run = Run([p], hypers=1, by_rows=True)
    for rows in ([4, 0], [], [1, 2, 3]):
        values, index = torch.ones(len(rows), 6, device=ON_GPU), torch.tensor(rows, dtype=torch.int64, device=ON_GPU)
        launches = run((0.1, 0.0), substitutes=[(p, values, index)])
        assert launches[-1].kernel == ("update" if rows else "prologue")
        if rows:
            (row,) = run.rows()
            assert row["more"] == [index.data_ptr(), 6, 5, tagged(run.state[p]["step"])]
            assert numbers(launches[-1].values["sizes"], ctypes.c_int64, 2) == [6 * len(rows), 0]


@pytest.mark.parametrize("hypers", [None, 1])
def test_a_parameter_without_gradient_keeps_its_place(hypers: int | None) -> None:
    params = [parameter(n, device=ON_GPU) for n in (9, 2, 4)]
    run = Run(params, hypers=hypers)
    gradients = [p.grad for p in params]
    values = (1.0, 0.0, 3.0)
    run(values)
    whole = run.buffer.clone()
    params[0].grad = None
    launches = run(values)
    assert len(written(launches)) == 1
    (row, *others) = run.rows()
    assert (row["flat"], row["skip"], row["more"]) == ([0] * 3, 1, [0] * len(row["more"]))
    assert [other["skip"] for other in others] == [0, 0]
    if not hypers:
        assert [run.state[p]["step"].item() for p in params] == [1, 2, 2]
    versions = params[0]._version
    for p in params[1:]:
        p.grad = None
    run.driver.reset()
    assert not run(values)  # nothing is updated
    assert params[0]._version == versions
    for p, grad in zip(params, gradients, strict=True):
        p.grad = grad
        run.state[p]["step"].zero_()
    run(values)
    assert run.buffer.equal(whole)


def test_parameters_that_share_memory_take_turns() -> None:
    base = torch.zeros(10)
    params = [parameter(3), base[:6], base[4:], parameter(2)]
    for p in params:
        p.grad = torch.ones_like(p)
    run = Run(params)
    for _ in range(2):
        launches = run((1.0, 2.0, 3.0))
        updates = [launch for launch in launches if launch.kernel == "update"]
        assert [numbers(u.values["sizes"], ctypes.c_int64, 2)[0] for u in updates] == [3, 6, 6]
        assert run.rows()[0]["flat"][0] == params[2].data_ptr()


@pytest.mark.parametrize("device", ["cpu", ON_GPU], ids=["host", "device"])
def test_what_shares_memory_is_refused_where_it_cannot_be_updated_in_order(device: Any) -> None:
    host = registry.host_module()
    base, step = torch.zeros(8, device=device), torch.zeros((), device=device)
    own_gradient = (False, base[:4], base[2:6], (step.clone(), torch.zeros(4, device=device)))
    counted = [(False, p, torch.ones_like(p), (step, torch.zeros_like(p))) for p in (base[:4], base[4:])]
    on_host = torch.zeros(())
    counted_on_host = [(*m[:3], (on_host, m[3][1])) for m in counted]
    copied, twice, *others = (host.conflicts(members, 1) for members in ([own_gradient], counted, counted_on_host))
    assert others == [[None, None]]
    if device == "cpu":
        assert (copied, twice) == ([None], [None, None])
    else:
        assert "only gradients in host memory are copied first" in copied[0]
        assert all("its step count is also that of another parameter" in reason for reason in twice)


@pytest.mark.parametrize("share", ["gradient", "count"])
def test_a_plan_is_stale_when_memory_comes_to_be_shared(share: str) -> None:
    params = [parameter(4, device=ON_GPU) for _ in range(2)]
    run = Run(params, hypers=1)
    run((0.1, 0.0))
    if share == "gradient":
        params[0].grad = params[0].detach()
    else:
        run.state[params[1]]["step"] = run.state[params[0]]["step"]
    with pytest.raises(AssertionError, match="tensors came to share memory"):
        run((0.1, 0.0))


# ---- chunks

SHAPES: dict[str, list[int]] = {
    "one": [1],
    "empty": [0],
    "empty ones among others": [0, 5, 0, 0, 4, 0],
    "blocks and one less and one more": [BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK, 3 * BLOCK + 1],
    "as many chunks as blocks": [BLOCK * MOST_CHUNKS],
    "two blocks in a chunk": [BLOCK * MOST_CHUNKS + 1, 1, 2 * BLOCK, 2 * BLOCK + 1],
    "many blocks in a chunk": [10 * BLOCK * MOST_CHUNKS - 3, 39, 40, 41],
    "more tensors than a grid is wide": [*[1] * 65_536, 0, BLOCK + 1],
}


@pytest.mark.parametrize("sizes", SHAPES.values(), ids=SHAPES)
def test_chunks_cover_each_element_once(sizes: list[int]) -> None:
    params = list(torch.zeros(sum(sizes)).split(sizes))
    for p, grad in zip(params, torch.ones(sum(sizes)).split(sizes), strict=True):
        p.grad = grad
    run = Run(params, counts=0)
    launches = run((1.0, 2.0, 3.0))
    if not sum(sizes):
        assert "update" not in run.driver.kernels
        return
    update = launches[-1]
    chunks, repeat = update.values["chunks"], update.values["repeat"]
    assert chunks <= MOST_CHUNKS + len(sizes)
    assert repeat == 1 or chunks > MOST_CHUNKS // 2
    y, z = update.grid[1:]
    assert y <= 65_535
    assert (z - 1) * y < chunks <= z * y
    assert update.values["tensor_of"] + 4 * chunks <= run.buffer.data_ptr() + 8 * len(run.buffer)
    pairs = torch.tensor(numbers(update.values["sizes"], ctypes.c_int64, 2 * len(sizes))).view(-1, 2)
    assert pairs[:, 0].tolist() == sizes
    tensor_of = torch.tensor(numbers(update.values["tensor_of"], ctypes.c_int32, chunks))
    begin = (torch.arange(chunks) - pairs[tensor_of, 1]) * repeat * BLOCK
    taken = torch.minimum(pairs[tensor_of, 0] - begin, torch.tensor(repeat * BLOCK))
    assert taken.gt(0).all()
    ends = torch.zeros(len(sizes), dtype=torch.int64).index_add_(0, tensor_of, taken)
    assert ends.tolist() == sizes
    inside = tensor_of[1:] == tensor_of[:-1]  # a chunk begins where the one before it ends
    assert begin[1:][inside].equal((begin + taken)[:-1][inside])
    assert begin[torch.cat([torch.tensor([True]), ~inside])].eq(0).all()


# ---- what is sent


def test_only_words_that_changed_are_sent() -> None:
    params = [parameter(n) for n in range(1, 200)]
    run = Run(params)

    def changed(*values: tuple[float, ...]) -> tuple[int, int] | None:
        """The places of the first and the last word that a step changed, and no other word was sent."""
        before = run.buffer.clone()
        sent = [(from_ - run.buffer.data_ptr(), to - run.buffer.data_ptr()) for from_, to in written(run(*values))]
        different = (run.buffer != before).nonzero().flatten().tolist()
        assert all(a[1] == b[0] for a, b in itertools.pairwise(sent))
        ends = (sent[0][0] // 8, sent[-1][1] // 8) if sent else None
        assert ends == ((different[0], different[-1] + 1) if different else None)
        return ends

    assert changed((1.0, 2.0, 3.0))[0] == 0
    assert changed((1.0, 2.0, 3.0)) is None
    assert changed((1.0, 2.5, 4.0)) == (1, 3)
    assert changed((1.0, 2.5, 4.5)) == (2, 3)
    stride = 5
    for p in params[3:100:8]:
        p.grad = p.grad.clone()
    first, end = changed((1.0, 2.5, 4.5))
    assert (first, end) == (3 + 3 * stride + 1, 3 + 99 * stride + 2)
    params[-1].grad = torch.ones_like(params[-1])
    assert changed((2.0, 2.5, 4.5)) == (1, 3 + 198 * stride + 2)


def test_all_words_are_sent_where_the_tensors_or_rows_are_others() -> None:
    params = [parameter(n) for n in range(1, 200)]
    run = Run(params)

    def fewer() -> None:
        params[5].grad = None

    def longer() -> None:
        params[9].data = torch.zeros(999)
        params[9].grad, run.state[params[9]]["moment"] = torch.ones(999), torch.zeros(999)

    def counted_otherwise() -> None:
        run.state[params[7]]["step"].fill_(50)

    for change in (lambda: None, fewer, longer, counted_otherwise):
        change()
        sent = written(run((1.0, 2.0, 3.0), (4.0, 5.0, 6.0)))
        update = run.driver.launches[-1].values
        end = update["tensor_of"] + (update["chunks"] + 1) // 2 * 8
        assert (sent[0][0], sent[-1][1]) == (run.buffer.data_ptr(), end)
        assert not written(run((1.0, 2.0, 3.0), (4.0, 5.0, 6.0)))


@pytest.mark.parametrize(("version", "most"), [(12000, 510), (12010, 4093)])
def test_words_come_in_the_parameters_of_as_few_kernels_as_take_them(
    version: int, most: int, driver: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    images: dict[int, bytes] = {}  # of the kernels, by how many words they take

    def read(launched: Any) -> Any:
        if launched.name == b"write":
            size = int(re.search(rb"words\[(\d+)\]", launched.image)[1])
            images[size // 8] = launched.image
        return _read(launched)

    _read = stand_in_gpu._read
    monkeypatch.setattr(stand_in_gpu, "_read", read)
    driver._library.stand_in_version(version)
    run = Run([parameter(1) for _ in range(2000)], native=cuda_launch.Driver(_native().functions, driver.name))
    sizes = [(to - from_) // 8 for from_, to in written(run((1.0, 2.0, 3.0)))]
    assert sizes[:-1] == [most] * (len(sizes) - 1)
    assert sizes[-1] <= most
    for stretch in (1, 99, 800):
        for p in (run.params[0], run.params[stretch - 1]):
            p.grad = p.grad.clone()
        run((1.0, 2.0, 3.0))
    assert images.keys() == {62, 510, most}
    for words, image in images.items():
        assert (b".version 8.1" in image) == (words > 510)  # which drivers before CUDA 12.1 do not read
        file = tmp_path / "write.ptx"
        file.write_bytes(image)
        assembler = Path(nvidia.__file__).parent / "bin" / "ptxas"
        subprocess.run([assembler, "--gpu-name=sm_80", file, "--output-file=/dev/null"], check=True)


def test_all_is_sent_while_a_graph_is_captured_and_to_a_new_buffer() -> None:
    params = [parameter(n) for n in (3, 4, 5)]
    run = Run(params)
    run((1.0, 2.0, 3.0))
    whole, kept = sum(b - a for a, b in written(run.driver.launches)), run.buffer
    image = kept.clone()
    for capturing in (True, True, False):
        run.step_is(torch.full_like(kept, -1), capturing=capturing)
        sent = [sum(to - from_ for from_, to in written(run((1.0, 2.0, 3.0)))) for _ in range(2)]
        assert sent == [whole, whole if capturing else 0]
        assert run.rows()[0]["scalars"] == [1, 2, 3]
    assert kept.equal(image)


# ---- errors


def test_a_buffer_that_is_too_small() -> None:
    p = parameter(3)
    run = Run([p])
    needed = 1 + 2 + 5 + 2 + 1
    run.step_is(torch.full((needed - 1,), -1))
    with pytest.raises(
        RuntimeError, match=f"a launch of 1 tensors needs {needed} words, and its buffer has {needed - 1}"
    ):
        run((1.0, 2.0, 3.0))
    assert not run.driver.launches
    assert run.state[p]["step"] == 0
    run.step_is(torch.full((needed,), -1))
    run((1.0, 2.0, 3.0))
    assert run.state[p]["step"] == 1


def test_an_error_of_the_driver_is_raised(driver: Any) -> None:
    p = parameter(3)
    run = Run([p])
    whole = sum(b - a for a, b in written(run((1.0, 2.0, 3.0))))
    driver.fail("cuLaunchKernel", 700)
    with pytest.raises(RuntimeError, match="cuLaunchKernel: an illegal memory access was encountered"):
        run((1.0, 2.0, 3.0))
    assert run.state[p]["step"] == 1
    assert sum(b - a for a, b in written(run((1.0, 2.0, 3.0)))) == whole  # what the buffer holds is not known


def test_a_driver_that_cannot_be_opened() -> None:
    with pytest.raises(RuntimeError, match=r"the CUDA driver cannot be opened: .*nowhere\.so"):
        cuda_launch.driver("/nowhere.so")
    with pytest.raises(RuntimeError, match=r"the CUDA driver has no cuInit: CUDA 12\.0 or newer is needed"):
        cuda_launch.driver("libc.so.6")
