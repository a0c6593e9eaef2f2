"""The text of each kernel in Triton's interpreter, beside the same rule on float64 tensors."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from cases import ELEMENTWISE, FEW_KERNELS, accepted, named, numbers_of, sample, switch_sets, with_all_numbers
from torch import Tensor

from compiled_optim import AdamW
from compiled_optim._engine.kernels.backends.cuda import Cuda, block_of
from compiled_optim._engine.kernels.backends.triton_text import PROLOGUE_ARGUMENTS, UPDATE_ARGUMENTS
from compiled_optim._engine.kernels.prologue import hypers_of
from compiled_optim._engine.kernels.trace import Signature, trace
from compiled_optim._engine.one_pass import ARGUMENTS, OnePass
from compiled_optim._engine.rule import apply, evaluate, first_scalars

interpreted = pytest.importorskip("interpreted", exc_type=ImportError)
BACKEND = Cuda(90)
REPEAT = 2  # blocks of a chunk
SKIPPED, MISALIGNED, NOT_FINITE = 3, 6, 7  # tensors
SCALE = 64.0
GIVEN = {"grad_factor": 0.7, "ema_decay": 0.9}  # in each step
ONE_PASS = {"max_grad_norm": 1.0, "ema_decay": GIVEN["ema_decay"], "master_weights": True}


def signature_of(cls: Any, options: dict[str, Any], *dtypes: torch.dtype, **changes: Any) -> Signature:
    """Of a parameter with the first dtype and state with the last."""
    rule = cls.rule.extended(OnePass(**{k: v for k, v in options.items() if k in ARGUMENTS}).extras)
    declaration = rule.declaration
    choice = declaration.read(declaration.check(options))
    buffers = declaration.kept(choice.switches, dtypes[0])
    scalars = tuple(first_scalars(rule, choice.hyper))
    if changes.get("on_device"):
        others = [(k, v) for k, v in choice.hyper._asdict().items() if k not in declaration.numbers]
        changes["constants"] = tuple(others)
    all_dtypes = (dtypes[0], *dtypes[-1:] * len(buffers))
    return Signature(rule, choice.switches, all_dtypes, buffers, scalars, backend=BACKEND.name, **changes)


def groups(cls: Any, switches: dict[str, Any]) -> list[dict[str, Any]]:
    """The options of two param groups with these switches and other values of the numbers."""
    around = {k: v for k, v in switches.items() if k in ARGUMENTS}
    first = with_all_numbers(cls, {k: v for k, v in switches.items() if k not in around})
    second = {**first, **{k: sample(k, f, 0.3) for k, f in numbers_of(cls).items() if k in first}}
    return [{**first, **around}, {**(second if accepted(cls, second) else first), **around}]


def address(t: Tensor) -> int:
    """Its lowest bit tells a prologue that it is that of a float32."""
    return t.data_ptr() + (t.dtype is torch.float32)


class Launch:
    """Tensors of a launch, the words that tell a kernel where they lie, and what must be there afterwards.

    Every second tensor is of the second param group, and each has a step count of its own.
    """

    def __init__(self, cls: Any, switches: dict[str, Any], *dtypes: torch.dtype, **changes: Any) -> None:
        options = groups(cls, switches)
        self.signature = signature = signature_of(cls, options[0], *dtypes, **changes)
        self.block = b = block_of(signature)
        rule, declaration = signature.rule, signature.rule.declaration
        self.hypers = [declaration.read(declaration.check(o)).hyper for o in options]
        self.sizes = self.elements_of_gradients(b)
        self.tensors = [self.row(i, n) for i, n in enumerate(self.sizes)]
        self.before = [[t.clone() for t in row] for row in self.tensors]
        self.skip = torch.tensor([0.0, 1.0])
        first = [[c.first(h._asdict()) for c in declaration.carried.values()] for h in self.hypers]
        # of what is counted or carried, some in float32 and some in float64
        step = float if declaration.counts else lambda i: 1.0  # then only the first is told from the others
        values = [[step(i), *(v * 0.9 if i else v for v in first[i % 2])] for i in range(len(self.sizes))]
        kinds = itertools.cycle((torch.float32, torch.float64, torch.float64))
        self.counts = [[torch.tensor(v, dtype=next(kinds)) for v in row] for row in values if declaration.counts]
        self.wanted, self.counted = [], []
        for i, row in enumerate(values):
            before = [c.item() for c in self.counts[i]] if self.counts else row
            scalars, carried = evaluate(rule, self.hypers[i % 2], (before[0] + 1, *before[1:]), GIVEN)
            self.wanted.append([*map(float, scalars.values()), *([SCALE] if signature.scaled else [])])
            self.counted.append([before[0] + 1, *carried])
        self.factors = torch.tensor(self.wanted, dtype=signature.scalar_dtype)

    def elements_of_gradients(self, block: int) -> list[int]:
        return [1, 5, 0, block - 1, block, block + 1, block + 3, 2 * block, 3 * block + 7]

    def row(self, i: int, size: int) -> list[Tensor]:
        """Parameter, gradient and state: positive, and so that the variance of centered RMSprop is not all rounding."""
        dtypes = self.signature.flat_dtypes
        values = [torch.randn(2, size + 1), (1 + torch.rand(len(dtypes) - 2, size + 1)) / 2]
        values[1] /= 2 ** torch.arange(len(dtypes) - 2)[:, None]
        whole = [t.to(d) for t, d in zip(torch.cat(values), dtypes, strict=True)]
        row = [t[1:] if i == MISALIGNED else t[1:].clone() for t in whole]
        if i == NOT_FINITE:
            row[1][:4] = torch.tensor([torch.nan, torch.inf, -torch.inf, 0.0])
        if self.signature.scaled:
            row[1] *= SCALE
        if "master" in self.signature.buffers:
            row[0].copy_(row[self.signature.flat.index("master")])
        return row

    def words(self, i: int) -> list[int]:
        """The row of the table for one tensor."""
        words = [*map(Tensor.data_ptr, self.tensors[i]), self.factors[i].data_ptr()]
        words.append(self.skip[int(i == SKIPPED)].data_ptr())
        if self.signature.on_device:
            words += [*map(address, self.counts[i] if self.counts else []), self.given[i % 2].data_ptr()]
        elif "grad_factor" in self.signature.scalars:
            words.append(self.factors[i, self.signature.scalars.index("grad_factor")].data_ptr())
        return words

    def table(self) -> Tensor:
        return torch.tensor([self.words(i) for i in range(len(self.tensors))])

    def prologue(self) -> None:
        """Counts the step and computes the factors, which are not given to the update otherwise."""
        self.factors.fill_(torch.nan)
        names = hypers_of(self.signature)
        kinds = itertools.cycle((torch.float64, torch.float64, torch.float32))
        others = {"step": 2.0, "grad_scale": SCALE, **GIVEN}
        # a float32 where that holds the value exactly
        self.numbers = [
            [torch.tensor(float({**others, **h._asdict()}[n]), dtype=next(kinds)) for n in names] for h in self.hypers
        ]
        exact = [[float({**others, **h._asdict()}[n]) for n in names] for h in self.hypers]
        for row, values in zip(self.numbers, exact, strict=True):
            row[:] = [t if t.item() == v else t.double().fill_(v) for t, v in zip(row, values, strict=True)]
        self.given = [torch.tensor([*map(address, row)]) for row in self.numbers]
        tensors = len(self.tensors)
        scratch = torch.empty(tensors, len(names) + len(self.signature.rule.declaration.counts), dtype=torch.float64)
        table = self.table()
        values = {"table": table.data_ptr(), "numbers": scratch.data_ptr(), "tensors": tensors}
        lanes = 4  # so that there is more than one block, and the last is not full
        text = BACKEND.prologue(self.signature)
        interpreted.run(text, "prologue", (1, -(-tensors // lanes), 1), PROLOGUE_ARGUMENTS, values, lanes)

    def update(self) -> None:
        chunks = [-(-n // (self.block * REPEAT)) for n in self.sizes]
        firsts = itertools.accumulate(chunks, initial=0)
        sizes = torch.tensor(list(zip(self.sizes, firsts, strict=False)))
        tensor_of = torch.arange(len(chunks), dtype=torch.int32).repeat_interleave(torch.tensor(chunks))
        table = self.table()
        places = {"table": table.data_ptr(), "sizes": sizes.data_ptr(), "tensor_of": tensor_of.data_ptr()}
        text = BACKEND.full_source(self.signature, BACKEND.lower(trace(self.signature, "cuda")))
        grid = (1, 4, -(-len(tensor_of) // 4))  # some blocks have nothing to do
        values = {**places, "chunks": len(tensor_of), "repeat": REPEAT}
        interpreted.run(text, "update", grid, UPDATE_ARGUMENTS, values, self.block)

    def compare(self) -> None:
        """All tensors, with the rule in float64."""
        for i, (after, before) in enumerate(zip(self.tensors, self.before, strict=True)):
            expected = before if i == SKIPPED else self.expected(i)
            for name, a, e in zip(self.signature.flat, after, expected, strict=True):
                eps = 0 if i == SKIPPED else 4 * torch.finfo(a.dtype).eps
                close(a, e, eps, f"{name} of tensor {i}")

    def expected(self, i: int) -> list[Tensor]:
        signature = self.signature
        p, g, *state = (t.double() for t in self.before[i])
        if "master" in signature.buffers:
            p = state[signature.buffers.index("master")]
        g = g / SCALE if signature.scaled else g
        scalars = dict(zip(signature.scalars, torch.tensor(self.wanted[i], dtype=torch.float64), strict=False))
        named_state = dict(zip(signature.buffers, state, strict=True))
        new, new_state = apply(signature.rule, signature.switches, p, g, named_state, scalars)
        return [new, g, *new_state.values()]


class RowsLaunch(Launch):
    """Gradients hold some rows of their parameters, in any order."""

    ROWS = 9  # of each parameter

    def elements_of_gradients(self, block: int) -> list[int]:
        self.widths = [1, 5, 3, block - 1, block // 4, 7, block + 3, 2 * block]  # of a row
        counts = [1, 3, 0, 2, 8, 9, 2, 1]
        self.rows = [torch.randperm(self.ROWS)[:count] for count in counts]
        return [width * count for width, count in zip(self.widths, counts, strict=True)]

    def row(self, i: int, size: int) -> list[Tensor]:
        param, grad, *buffers = super().row(i, self.ROWS * self.widths[i])
        return [param, grad[:size].clone(), *buffers]

    def words(self, i: int) -> list[int]:
        return [*super().words(i), self.rows[i].data_ptr(), self.widths[i], self.ROWS]

    def expected(self, i: int) -> list[Tensor]:
        whole = self.before[i]
        shapes = [(len(self.rows[i]) if j == 1 else self.ROWS, self.widths[i]) for j in range(len(whole))]
        matrices = [t.double().view(shape) for t, shape in zip(whole, shapes, strict=True)]
        self.before[i] = [m if j == 1 else m[self.rows[i]] for j, m in enumerate(matrices)]
        for j, (m, new) in enumerate(zip(matrices, super().expected(i), strict=True)):
            if j != 1:
                m[self.rows[i]] = new
        return [m.flatten() for m in matrices]


def close(actual: Tensor, expected: Tensor, eps: float, what: str) -> None:
    torch.testing.assert_close(
        actual.double(), expected.double(), rtol=eps, atol=eps, equal_nan=True, msg=lambda text: f"{what}: {text}"
    )


def keeps_untouched_rows(cls: Any, switches: dict[str, Any]) -> bool:
    on = cls.rule.declaration.read(cls.rule.declaration.check(switches)).switches
    try:
        return bool(cls.accepts_sparse and cls.rule.keeps_untouched_rows(on))
    except RuntimeError:  # a sparse gradient is refused with these
        return False


def cases(*sets: list[tuple[Any, ...]]) -> Any:
    all_sets = [case for cases in sets for case in cases]
    ids = [f"{c.__name__}-{named(s)}-{'-'.join(str(d).removeprefix('torch.') for d in ds)}" for c, s, *ds in all_sets]
    return pytest.mark.parametrize("case", all_sets, ids=ids)


EVERY = [(cls, switches) for cls in ELEMENTWISE for switches in switch_sets(cls)]
SPARSE = [(cls, switches) for cls, switches in FEW_KERNELS if keeps_untouched_rows(cls, switches)]
SCALABLE = [(cls, switches) for cls, switches in FEW_KERNELS if "fused" in cls.rule.declaration.options]


@cases(
    [(*pair, torch.float32) for pair in EVERY],
    [(*pair, dtype) for pair in FEW_KERNELS for dtype in (torch.bfloat16, torch.float64)],
    [(*pair, torch.float16) for pair in SCALABLE],
    [(*pair, torch.bfloat16, torch.float32) for pair in FEW_KERNELS],
)
def test_update(case: tuple[Any, ...]) -> None:
    launch = Launch(*case)
    launch.update()
    launch.compare()


@cases([(*pair, *dtypes) for pair in FEW_KERNELS[:1] for dtypes in ((torch.bfloat16, torch.float32), (torch.float32,))])
def test_update_of_gradients_of_another_dtype(case: tuple[Any, ...]) -> None:
    launch = Launch(*case, grad_dtype=torch.float32 if torch.bfloat16 in case else torch.bfloat16)
    launch.update()
    launch.compare()


@pytest.mark.parametrize("on_device", [False, True], ids=["host", "device"])
def test_one_pass(on_device: bool) -> None:
    """The master takes the place of the parameter, which is rounded from it; the average is of masters."""
    launch = Launch(AdamW, ONE_PASS, torch.bfloat16, torch.float32, on_device=on_device)
    if on_device:
        launch.prologue()
    launch.update()
    launch.compare()


@pytest.mark.slow
@cases([(*pair, torch.bfloat16) for pair in EVERY])
def test_update_of_all_switches(case: tuple[Any, ...]) -> None:
    launch = Launch(*case)
    launch.update()
    launch.compare()


@cases([(*pair, torch.float32) for pair in FEW_KERNELS], [(*pair, torch.float64) for pair in FEW_KERNELS])
def test_prologue(case: tuple[Any, ...]) -> None:
    launch = Launch(*case, on_device=True)
    launch.prologue()
    wanted = torch.tensor(launch.wanted, dtype=torch.float64)
    eps = 4 * torch.finfo(launch.factors.dtype).eps
    updated = [i for i in range(len(wanted)) if i != SKIPPED]
    before = launch.counted[SKIPPED][0] - 1
    close(launch.factors[updated], wanted[updated], eps, "scalars")
    for i, counts in enumerate(launch.counts):
        assert counts[0].item() == (before if i == SKIPPED else launch.counted[i][0])
        for c, e in zip(counts[1:], launch.counted[i][1:], strict=True):
            if i != SKIPPED:
                close(c, torch.tensor(e, dtype=torch.float64), 4 * torch.finfo(c.dtype).eps, f"carried of tensor {i}")
    launch.update()
    launch.compare()


@cases([(*pair, dtype) for pair in SPARSE for dtype in (torch.float32, torch.bfloat16)])
def test_touched_rows(case: tuple[Any, ...]) -> None:
    launch = RowsLaunch(*case, by_rows=True)
    launch.update()
    launch.compare()


@cases([(*pair, dtype) for pair in SCALABLE for dtype in (torch.float32, torch.float16)])
def test_scaled(case: tuple[Any, ...]) -> None:
    launch = Launch(*case, on_device=True, scaled=True)
    launch.prologue()
    launch.update()
    launch.compare()
