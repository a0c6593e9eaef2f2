"""Averages by a user's function, and of a model that is not what it was."""

from __future__ import annotations

import contextlib
import copy
import functools
import itertools
import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from averaging import AVERAGES, Net, assert_same_state, change
from torch import Tensor, nn
from torch.optim import swa_utils as stock

from compiled_optim import CompileFallbackWarning, swa_utils
from compiled_optim.lr_scheduler import get_ema_decay_fn
from compiled_optim.swa_utils import AveragedModel
from compiled_optim.testing import assert_compiles

compiled = pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])

# ---- an avg_fn of one's own, which a kernel would freeze or take for something else


class Decaying:
    decay = 0.5

    def __call__(self, average: Tensor, model: Tensor, averaged: Any) -> Tensor:
        return average * self.decay + model * (1 - self.decay)


def unfrozen() -> dict[str, tuple[Any, Callable[[int], Any]]]:
    """Functions, and what happens before each update."""
    tensor, calls, decaying = torch.tensor(0.5, dtype=torch.float64), [], Decaying()

    def decays(value: float) -> None:
        decaying.decay = value

    def counting(average: Tensor, model: Tensor, averaged: Any) -> Tensor:
        calls.append(1)
        return average * 0.9 + model * 0.1 * len(calls)

    def branching(average: Tensor, model: Tensor, averaged: Any) -> Tensor:
        return model if averaged < 3 else average * 0.9 + model * 0.1

    def warming_up(average: Tensor, model: Tensor, averaged: Any) -> Tensor:
        decay = min(0.999, (1 + averaged) / (10 + averaged))
        return average * decay + model * (1 - decay)

    def nothing(i: int) -> None:
        pass

    return {
        "a tensor": (lambda a, m, n: a * tensor + m * (1 - tensor), lambda i: tensor.fill_(0.5 + 0.05 * i)),
        "an object": (lambda a, m, n: a + (m - a) * getattr(decaying, "decay"), lambda i: decays(i / 8)),  # noqa: B009
        "calls": (counting, nothing),
        "branch": (branching, nothing),
        "minimum": (warming_up, nothing),
        "int": (lambda a, m, n: a * 0.9 + m * 0.1 if int(n) > 3 else m, nothing),
        "item": (lambda a, m, n: a + (m - a) / (n.item() + 1), nothing),
        "dtype of the count": (lambda a, m, n: a + (m - a) / 3 if n.dtype == torch.int64 else m, nothing),
        "float32 count": (lambda a, m, n: a + (m - a) * (1 / (n + 2)), nothing),
        "exponential": (lambda a, m, n: a + (m - a) * torch.exp(-n / 10.0), nothing),
        "dimensions": (lambda a, m, n: a + (m - a) / (a.ndim + 2), nothing),
        "rows": (lambda a, m, n: a + (m - a) / (len(a) if a.ndim else 7), nothing),
        "flip": (lambda a, m, n: (a + m.flip(0)) / 2 if a.ndim else a, nothing),
        "norm": (lambda a, m, n: a + (m - a) / (1 + m.norm()), nothing),
        "in place": (lambda a, m, n: a.lerp_(m, 0.1), nothing),
    }


@pytest.mark.parametrize("kind", unfrozen())
def test_what_a_trace_would_get_wrong_is_called(kind: str, lenient: None) -> None:
    averages: list[Any] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for make in (stock.AveragedModel, functools.partial(AveragedModel, compiled=True)):
            function, before = unfrozen()[kind]
            torch.manual_seed(0)
            model = Net().double()
            averages.append(make(model, avg_fn=function))
            for i in range(5):
                before(i)
                change(model)
                averages[-1].update_parameters(model)
    fallbacks = [str(w.message) for w in caught if w.category is CompileFallbackWarning]
    if kind != "calls":  # of which our trial is one
        assert_same_state(averages[1], averages[0])
    assert len(fallbacks) == 1
    assert "averaged eagerly" in fallbacks[0] or "the average is updated eagerly" in fallbacks[0]


def test_a_change_of_what_it_refers_to(lenient: None) -> None:
    """A kernel until then; of an attribute of an object, and a list in a dict."""
    model, decaying, table = Net().double(), Decaying(), {"factor": [1.0]}

    def function(average: Tensor, model: Tensor, averaged: Any) -> Tensor:
        return (average * decaying.decay + model * (1 - decaying.decay)) * table["factor"][0]

    reference, mine = stock.AveragedModel(model, avg_fn=function), AveragedModel(model, avg_fn=function, compiled=True)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for i in range(6):
            assert not caught or i > 3
            if i == 3:
                decaying.decay = 0.25
            if i == 4:
                table["factor"][0] = 0.5
            change(model)
            reference.update_parameters(model)
            mine.update_parameters(model)
            assert_same_state(mine, reference)
    assert [w.category for w in caught] == [CompileFallbackWarning]
    assert "refers to has changed" in str(caught[0].message)


def test_complex_tensors_are_not_split_for_a_function_of_ones_own(lenient: None) -> None:
    model = nn.ParameterList([torch.randn(3, dtype=torch.complex128)])

    def rotated(average: Tensor, model: Tensor, averaged: Any) -> Tensor:
        return average * 0.5 + model * 0.5j * model.abs()

    reference, mine = stock.AveragedModel(model, avg_fn=rotated), AveragedModel(model, avg_fn=rotated, compiled=True)
    for i in range(3):
        change(model)
        reference.update_parameters(model)
        with pytest.warns(CompileFallbackWarning, match="complex") if i == 1 else contextlib.nullcontext():
            mine.update_parameters(model)
    assert_same_state(mine, reference)


# ---- decays that change


DECAYS: dict[str, Callable[[int], float]] = {
    "ready-made": get_ema_decay_fn(0.9),
    "one that begins late": lambda n: 0.0 if n < 3 else 0.75,
    "ones and zeros": lambda n: float(n % 2),
}


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("get", ["get_ema_avg_fn", "get_ema_multi_avg_fn"])
def test_a_decay_may_change_with_each_update(get: str, compiled: bool) -> None:
    """As a function, as a tensor that is filled, by assignment to what we return, and in the closure of torch's."""
    argument = get.removeprefix("get_ema_")
    for decay in DECAYS.values():
        model, tensor = Net().double(), torch.tensor(0.0, dtype=torch.float64)
        functions = [getattr(swa_utils, get)(d) for d in (decay, tensor, 0.5)] + [getattr(stock, get)(0.5)]
        averages = [AveragedModel(model, **{argument: f}, compiled=compiled) for f in functions]
        expected = copy.deepcopy(averages[0])
        with assert_compiles() as found:
            for n in range(8):
                change(model)
                tensor.fill_(decay(n))
                functions[2].decay = decay(n)
                functions[3].__wrapped__.__closure__[0].cell_contents = decay(n)
                stock.AveragedModel.update_parameters(expected, model)
                for average in averages:
                    average.update_parameters(model)
                    assert_same_state(average, expected)
        assert (found.kernels, found.graphs) <= (1, 0)


@compiled
def test_a_decay_out_of_range_changes_nothing(compiled: bool) -> None:
    for get, option in ((swa_utils.get_ema_avg_fn, "avg_fn"), (swa_utils.get_ema_multi_avg_fn, "multi_avg_fn")):
        model, function = Net().double(), get(lambda n: 0.5 if n < 4 else n / 2)
        average = AveragedModel(model, **{option: function}, compiled=compiled)
        for _ in range(4):
            average.update_parameters(model)
        before = copy.deepcopy(average.state_dict())
        change(model)
        with pytest.raises(ValueError, match=r"decay must be at least 0 and at most 1, got 2.0 after 4 models"):
            average.update_parameters(model)
        assert_same_state(average, before, 0)
        function.decay = 0.5
        average.update_parameters(model)
        assert average.n_averaged == 5


# ---- buffers of every dtype

DTYPES = [torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint32]
DTYPES += [torch.uint64, torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.complex128]
FLOAT8 = [torch.float8_e4m3fn, torch.float8_e5m2]
DTYPES += [torch.complex32, *FLOAT8]


class Buffered(nn.Module):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2, 2))
        self.register_buffer("values", torch.tensor([5, 0, 3]).to(dtype))
        self.register_buffer("count", torch.tensor(7))


def averaged_buffers(dtype: torch.dtype, wide: torch.dtype, make: Callable[[nn.Module], Any]) -> list[Tensor]:
    """After each update; computed in a dtype that may be wider, and rounded to the buffer's."""
    torch.manual_seed(0)
    model = Buffered(wide)
    average = make(model)
    found = []
    for values in ([5, 1, 3], [2, 0, 4], [0, 1, 9], [1, 0, 2]):
        model.values = torch.tensor(values).to(wide)
        average.update_parameters(model)
        found.append(average.module.values.to(dtype, copy=True))
        average.module.values.copy_(found[-1])
    return found


@compiled
@pytest.mark.filterwarnings("ignore:ComplexHalf", "ignore::compiled_optim.CompileFallbackWarning")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_buffers_of_every_dtype(dtype: torch.dtype, compiled: bool, lenient: None) -> None:
    """As torch averages them, or if that raises, as it averages a wider dtype, which is then rounded."""
    wide = {torch.complex32: torch.complex64, torch.bool: torch.float32, **dict.fromkeys(FLOAT8, torch.float32)}
    for label, (theirs, ours) in AVERAGES.items():
        if "custom" in label:
            continue
        single = {"avg_fn": stock.get_ema_avg_fn(0.9) if "EMA" in label else stock.get_swa_avg_fn()}
        for options, other in ((theirs, dtype), (single, dtype), (single, wide.get(dtype, torch.float64))):
            with contextlib.suppress(RuntimeError):
                make = functools.partial(stock.AveragedModel, use_buffers=True, **options)
                expected = averaged_buffers(dtype, other, make)
                break
        make = functools.partial(AveragedModel, use_buffers=True, compiled=compiled, **ours)
        rounding = 0 if not (dtype.is_floating_point or dtype.is_complex) else 4 * torch.finfo(dtype).eps
        for mine, theirs_now in zip(averaged_buffers(dtype, dtype, make), expected, strict=True):
            assert mine.dtype is dtype
            kind = torch.complex128 if dtype.is_complex else torch.float64
            torch.testing.assert_close(
                mine.to(kind),
                theirs_now.to(kind),
                rtol=max(rounding, 1e-7 if "multi" in label and rounding else 0),
                atol=rounding,
                msg=label,
            )


# ---- a model that is not what it was


class Subclass(nn.Parameter):
    pass


def retie(model: nn.Module) -> None:
    model.tied = nn.Linear(5, 4, dtype=torch.float64)


# what happens to the model, and what the error says, if there is one
CHANGES: dict[str, tuple[Callable[[Any], Any], str]] = {
    "a buffer more": (lambda m: m.register_buffer("late", torch.ones(2)), r"buffers .* got 4 for 3: .* \['late'\]"),
    "a buffer of another shape": (
        lambda m: setattr(m.norm, "running_mean", torch.ones(5)),
        r"'norm.running_mean' .*\(5,",
    ),
    "a buffer that broadcasts": (lambda m: setattr(m.norm, "running_mean", torch.ones(1, dtype=torch.float64)), ""),
    "a parameter more": (
        lambda m: m.register_parameter("late", nn.Parameter(torch.ones(2))),
        r"parameters .*\['late'\]",
    ),
    "a parameter less": (lambda m: delattr(m.norm, "bias"), r"got 8 for 9: it lacks \['norm.bias'\]"),
    "a parameter of another shape": (
        lambda m: setattr(m.last, "weight", nn.Parameter(torch.ones(7, 4).double())),
        r"'last.weight' of the model is of shape \(7, 4\), and its average of shape \(5, 4\)",
    ),
    "a parameter that broadcasts": (lambda m: setattr(m.last, "weight", nn.Parameter(torch.ones(4).double())), ""),
    "another parameter": (lambda m: setattr(m.last, "weight", nn.Parameter(torch.ones(5, 4).double())), ""),
    "a subclass of Parameter": (lambda m: setattr(m.last, "weight", Subclass(torch.ones(5, 4).double())), ""),
    "one of another dtype": (
        lambda m: setattr(m.last, "weight", nn.Parameter(torch.ones(5, 4))),
        "'last.weight' .*float32",
    ),
    "another dtype": (lambda m: m.float(), "'scale' of the model is torch.float32, and its average torch.float64"),
    "other ties": (retie, r"tied alike, .*\['tied.weight'\]"),
}
FUNCTIONS = {name: AVERAGES[name] for name in ("equal", "EMA", "EMA, multi_avg_fn")}


@pytest.mark.parametrize("kind", CHANGES)
def test_an_average_that_cannot_be_updated_is_left_as_it_is(kind: str, lenient: None) -> None:
    """It raises where torch does, and where torch pairs parameters that only stand at the same place."""
    change_model, message = CHANGES[kind]
    for theirs, ours in FUNCTIONS.values():
        for compiled, use_buffers in itertools.product((False, True), repeat=2):
            model = Net().double()
            reference = stock.AveragedModel(model, use_buffers=use_buffers, **theirs)
            mine = AveragedModel(model, use_buffers=use_buffers, compiled=compiled, **ours)
            for i in range(4):
                change(model)
                if i == 3:
                    change_model(model)
                before = copy.deepcopy(mine.state_dict())
                errors = []
                for averaged in (reference, mine):
                    with warnings.catch_warnings():
                        warnings.simplefilter("ignore", CompileFallbackWarning)
                        try:
                            errors.append(averaged.update_parameters(model))
                        except (RuntimeError, ValueError) as error:
                            errors.append(str(error))
            if errors[1] is None:
                assert errors[0] is None
                assert_same_state(mine, reference, 1e-7 if "dtype" in kind else 1e-12)
            else:
                assert message, errors[1]
                assert re.search(message, errors[1])
                assert_same_state(mine, before, 0)


@compiled
@pytest.mark.parametrize("option", ["avg_fn", "multi_avg_fn"])
def test_a_function_that_raises_midway_changes_nothing(option: str, compiled: bool, lenient: None) -> None:
    fails_at = [1000]

    def single(average: Tensor, model: Tensor, averaged: Any) -> Tensor:
        fails_at[0] -= 1
        if not fails_at[0]:
            raise KeyboardInterrupt
        return average * 0.9 + model * 0.1

    def several(averages: Any, models: Any, averaged: Any) -> None:
        for average, current in zip(averages, models, strict=True):
            average.copy_(single(average, current, averaged))

    model = Net()
    mine = AveragedModel(model, **{option: single if option == "avg_fn" else several}, compiled=compiled)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CompileFallbackWarning)
        mine.update_parameters(model)
        change(model)
        mine.update_parameters(model)
        before = copy.deepcopy(mine.state_dict())
        fails_at[0] = 3
        change(model)
        with pytest.raises(KeyboardInterrupt):
            mine.update_parameters(model)
    assert_same_state(mine, before, 0)


@pytest.mark.parametrize("use_buffers", [False, True])
@pytest.mark.parametrize("compiled", [False, True])
def test_what_a_model_came_to_have_last_is_ignored_as_by_torch(compiled: bool, use_buffers: bool) -> None:
    model = nn.Linear(4, 4)
    model.register_buffer("memory", torch.ones(3))
    reference = stock.AveragedModel(model, use_buffers=use_buffers)
    mine = AveragedModel(model, use_buffers=use_buffers, compiled=compiled)
    for i in range(5):
        change(model)
        if i == 2 and use_buffers:
            model.register_buffer("late", torch.ones(2))
        if i == 2 and not use_buffers:
            model.register_parameter("late", nn.Parameter(torch.ones(2)))
        reference.update_parameters(model)
        mine.update_parameters(model)
    assert_same_state(mine, reference, 1e-6)
