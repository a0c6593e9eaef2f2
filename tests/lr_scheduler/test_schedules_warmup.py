"""Warm-up before any schedule: stepped, attached, as values, resumed, composed."""

from __future__ import annotations

import copy
import pickle
import random
from typing import Any

import pytest
import torch
from schedule_cases import ARGUMENTS, CASES, LRS, STATEFUL, make_optimizer, near, scheduled, step, theirs

import compiled_optim
from compiled_optim import lr_scheduler as ours
from compiled_optim.lr_scheduler.symbolic import t

EVERY = CASES | STATEFUL
STEPS, WARM = 60, 9
RAMPS = {
    "linear": lambda x: x,
    "cosine": lambda x: (1 - torch.cos(torch.tensor(torch.pi * x, dtype=torch.float64)).item()) / 2,
    "polynomial": lambda x: x**2,
    "1-sqrt": lambda x: 1 - (1 - x) ** 0.5,
}
kinds = pytest.mark.parametrize("tensor", [False, True], ids=["float lr", "tensor lr"])


def expected(case: str, steps: int, warm: int = WARM, kind: str = "linear", start: float = 0.0) -> list[list[float]]:
    """Learning rates and momenta: those of torch's schedule, which begins after the warm-up."""
    schedule = EVERY[case](theirs, make_optimizer())
    first, rows = scheduled(schedule.optimizer), []
    for i in range(warm):
        factor = start + (1 - start) * RAMPS[kind](i / warm)
        rows.append([value * (factor if column < 2 else 1) for column, value in enumerate(first)])
    while len(rows) < steps:
        rows.append(scheduled(schedule.optimizer))
        step(schedule)
    return rows


def begin(case: str, tensor: bool = False, optim: str = "SGD", **options: Any) -> Any:
    optimizer = make_optimizer(optim, torch.float64 if tensor else None)
    return ours.warmup(EVERY[case](ours, optimizer), WARM, **options)


def attach(schedule: Any) -> Any:
    """The optimizer, which alone keeps itself and the schedule from here on."""
    optimizer = schedule.optimizer
    optimizer.attach(schedule)
    return optimizer


def run(schedule: Any, steps: int, attached: bool = False) -> list[list[float]]:
    rows = []
    for _ in range(steps):
        rows.append(scheduled(schedule.optimizer))
        if attached:
            for group in schedule.optimizer.param_groups:
                for p in group["params"]:
                    p.grad = torch.zeros_like(p)
            schedule.optimizer.step()
        else:
            step(schedule)
    return rows


def rows(values: list[list[float]]) -> Any:
    return [near(row) for row in values]


@pytest.mark.parametrize("attached", [False, True], ids=["stepped", "attached"])
@pytest.mark.parametrize("case", EVERY)
def test_any_schedule_begins_after_the_warm_up(case: str, attached: bool) -> None:
    for tensor in (False, True):
        schedule = begin(case, tensor)
        given = [group["lr"] for group in schedule.optimizer.param_groups]
        optimizer = attach(schedule) if attached else schedule.optimizer
        assert run(schedule, STEPS, attached) == rows(expected(case, STEPS))
        assert list(map(float, schedule.get_last_lr())) == near(scheduled(schedule.optimizer)[:2])
        if tensor:
            assert all(g["lr"] is lr for g, lr in zip(optimizer.param_groups, given, strict=True))


@pytest.mark.parametrize("case", [case for case in CASES if case != "SequentialLR-OneCycleLR"])
def test_values(case: str) -> None:
    """On the host, on tensors, as the expression, for the learning rate and for momentum."""
    schedule, table = begin(case, start_factor=0.2), expected(case, STEPS, start=0.2)
    columns = list(zip(*table, strict=True))
    for of, column in [("lr", 0), ("lr", 1), *([("momentum", 2)] if "momentum" in schedule.schedules else [])]:
        group, wanted = column % 2, list(columns[column])
        assert [schedule.value(i, group, of) for i in range(STEPS)] == near(wanted)
        assert schedule.value(torch.arange(STEPS, dtype=torch.float64), group, of).tolist() == near(wanted)
    expression = schedule.expression()
    assert [float(expression.subs(t, i)) for i in (0, 4, 8, 9, 40)] == near([columns[0][i] for i in (0, 4, 8, 9, 40)])
    assert schedule.latex().startswith(r"\eta_{t} = ")


@pytest.mark.parametrize("kind", RAMPS)
def test_ways_up(kind: str) -> None:
    schedule, table = begin("StepLR", kind=kind, start_factor=0.1), expected("StepLR", 30, kind=kind, start=0.1)
    assert [schedule.value(i) for i in range(30)] == near([row[0] for row in table])
    assert schedule.value(torch.arange(30.0).double()).tolist() == near([row[0] for row in table])
    assert [float(schedule.expression().subs(t, i)) for i in (0, 5, 8, 9)] == near([table[i][0] for i in (0, 5, 8, 9)])
    assert run(schedule, 30) == rows(table)


def test_a_cubic_way_and_none() -> None:
    schedule = begin("StepLR", kind="polynomial", power=3.0)
    assert schedule.value(3) == near(0.1 * (3 / 9) ** 3)
    optimizer = make_optimizer()
    at_once = ours.warmup(ours.StepLR(optimizer, 2), 0)
    assert at_once.expression().subs(t, 0) == near(0.1)
    assert run(at_once, 30) == rows(run(theirs.StepLR(make_optimizer(), 2), 30))


def test_it_is_what_transformers_has_by_another_name() -> None:
    cosine = ours.warmup(ours.CosineAnnealingLR(make_optimizer(), 40), 10)
    whole = ours.get_cosine_schedule_with_warmup(make_optimizer(), 10, 50)
    assert [cosine.value(i) for i in range(50)] == near([whole.value(i) for i in range(50)])


# ---- checkpoints and copies


@pytest.mark.parametrize("attached", [False, True], ids=["stepped", "attached"])
@pytest.mark.parametrize("place", [0, 4, WARM - 1, WARM, 30])
def test_resumes(place: int, attached: bool) -> None:
    for case in ("CosineAnnealingLR-eta_min", "OneCycleLR", "SequentialLR", "LambdaLR-of-numbers", "ChainedScheduler"):
        for tensor in (False, True):
            schedule = begin(case, tensor)
            run(schedule, place)
            saved = copy.deepcopy((schedule.optimizer.state_dict(), schedule.state_dict()))
            for order in ((0, 1), (1, 0)):
                resumed = begin(case, tensor)
                optimizer = attach(resumed) if attached else resumed.optimizer
                for i in order:
                    (optimizer, resumed)[i].load_state_dict(copy.deepcopy(saved[i]))
                optimizer._opt_called = True
                assert run(resumed, 20, attached) == rows(expected(case, place + 20)[place:]), (case, order)


def test_the_state_goes_through_a_file(tmp_path: Any) -> None:
    schedule = begin("CosineAnnealingLR", tensor=True)
    run(schedule, 5)
    torch.save(schedule.state_dict(), tmp_path / "state")
    resumed = begin("CosineAnnealingLR", tensor=True)
    resumed.optimizer.load_state_dict(schedule.optimizer.state_dict())
    resumed.load_state_dict(torch.load(tmp_path / "state", weights_only=True))
    assert run(resumed, 20) == rows(run(schedule, 20))


@pytest.mark.filterwarnings("ignore:Seems like `optimizer.step:UserWarning")  # torch does not watch a copy's steps
@pytest.mark.parametrize("place", [4, 20])
def test_copies(place: int) -> None:
    for case in ("CosineAnnealingLR", "CyclicLR", "SequentialLR"):
        schedule = begin(case)
        run(schedule, place)
        copies = [copy.deepcopy(schedule)]
        if "lr_lambda" not in ARGUMENTS.get(case, {}):
            copies.append(pickle.loads(pickle.dumps(schedule)))
        before = scheduled(schedule.optimizer)
        for other in copies:
            assert run(other, 20) == rows(expected(case, place + 20)[place:])
        assert scheduled(schedule.optimizer) == before


def test_the_optimizer_alone_is_resumed_in_the_middle_of_the_warm_up() -> None:
    """Its count of steps is the place of an attached schedule, which the learning rates confirm."""

    first, second = begin("CosineAnnealingLR", optim="AdamW"), begin("CosineAnnealingLR", optim="AdamW")
    optimizers = attach(first), attach(second)
    run(first, 5, attached=True)
    optimizers[1].load_state_dict(copy.deepcopy(optimizers[0].state_dict()))
    with pytest.warns(UserWarning, match="the attached Warmup did not: it goes on from step 5"):
        seen = run(second, 20, attached=True)
    assert seen == rows(run(first, 20, attached=True))


# ---- param groups and learning rates that change


def add_group(schedule: Any) -> None:
    schedule.optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(2))], "lr": 0.05})


@pytest.mark.parametrize("attached", [False, True], ids=["stepped", "attached"])
def test_a_group_that_comes_in_the_warm_up_is_refused(attached: bool) -> None:
    schedule = begin("ExponentialLR")
    optimizer = attach(schedule) if attached else schedule.optimizer
    run(schedule, 3, attached)
    add_group(schedule)
    before = [group["lr"] for group in optimizer.param_groups], schedule.last_epoch
    for _ in range(2):
        with pytest.raises(ValueError, match="a warm-up begun with 2 param groups cannot go on with 3"):
            run(schedule, 1, attached)
        assert ([group["lr"] for group in optimizer.param_groups], schedule.last_epoch) == before


def test_a_group_that_comes_later_is_the_schedules() -> None:
    schedule, stock = begin("ExponentialLR"), CASES["ExponentialLR"](theirs, make_optimizer())
    run(schedule, WARM + 3)
    run(stock, 3)
    add_group(schedule)
    add_group(stock)
    assert run(schedule, 5) == rows(run(stock, 5))


def test_a_change_by_hand_lasts_as_it_does_in_the_schedule() -> None:
    schedule = begin("ExponentialLR")
    run(schedule, 3)
    schedule.optimizer.param_groups[0]["lr"] = 7.0
    step(schedule)
    assert scheduled(schedule.optimizer) == near(expected("ExponentialLR", 5)[4])  # the warm-up sets it
    run(schedule, WARM)
    schedule.optimizer.param_groups[0]["lr"] = 0.3
    step(schedule)
    assert scheduled(schedule.optimizer)[0] == near(0.3 * 0.97)


def test_an_optimizer_that_was_scheduled_before_begins_anew() -> None:
    """As SequentialLR begins: from initial_lr, wherever the learning rate has come to."""
    optimizer = make_optimizer()
    run(ours.CosineAnnealingLR(optimizer, 10), 10)
    assert scheduled(optimizer)[0] == near(0.0)
    for build in (lambda: ours.CosineAnnealingLR(optimizer, 70), lambda: ours.LambdaLR(optimizer, lambda i: 0.98**i)):
        case = "CosineAnnealingLR" if isinstance(build(), ours.CosineAnnealingLR) else "LambdaLR"
        assert run(ours.warmup(build(), WARM), 30) == rows(expected(case, 30))


# ---- compositions


def stepped_is_the_value(schedule: Any, steps: int = 70, places: Any = (0, 9, 10, 25, 69)) -> None:
    table = [[schedule.value(i, group) for group in (0, 1)] for i in range(steps)]
    tensor = schedule.value(torch.arange(steps, dtype=torch.float64), 1).tolist()
    assert tensor == near([row[1] for row in table])
    expression = schedule.expression()
    assert [float(expression.subs(t, i)) for i in places] == near([table[i][0] for i in places])
    assert [row[:2] for row in run(schedule, steps)] == rows(table)


def test_compositions() -> None:
    def linear(o: Any) -> Any:
        return ours.warmup(ours.LinearLR(o, 1.0, 0.1, 15), 6, "cosine")

    builds: list[Any] = [
        lambda o: ours.warmup(linear(o), 5, start_factor=0.5),
        lambda o: ours.SequentialLR(o, [linear(o), ours.warmup(ours.ExponentialLR(o, 0.9), 4)], [20]),
        lambda o: ours.SequentialLR(o, [ours.ConstantLR(o, 0.5, 9), linear(o), ours.StepLR(o, 5)], [10, 40]),
        lambda o: ours.SequentialLR(
            o, [ours.SequentialLR(o, [ours.LinearLR(o), ours.StepLR(o, 4)], [5]), ours.PolynomialLR(o, 20)], [12]
        ),
        lambda o: ours.SequentialLR(
            o, [ours.PolynomialLR(o, 20), ours.SequentialLR(o, [ours.LinearLR(o), ours.StepLR(o, 4)], [5])], [12]
        ),
        lambda o: ours.SequentialLR(
            o, [ours.StepLR(o, 20), ours.ChainedScheduler([ours.LinearLR(o), ours.ExponentialLR(o, 0.9)])], [12]
        ),
        lambda o: ours.warmup(ours.SequentialLR(o, [linear(o), ours.get_rex_schedule(o, 3, 30)], [20]), 5),
        lambda o: ours.SequentialLR(
            o, [ours.StepLR(o, 5), ours.warmup(ours.MultiplicativeLR(o, lambda i: 0.9), 4), ours.StepLR(o, 7)], [12, 40]
        ),
        lambda o: ours.SequentialLR(o, [ours.StepLR(o, 5), ours.warmup(ours.SWALR(o, 0.01), 4)], [12]),
        lambda o: ours.warmup(ours.SymbolicLR(o, "base_lr*exp(-t/10)"), 9),
        lambda o: ours.warmup(ours.get_wsd_schedule(o, 3, 9, num_stable_steps=5), 4),
    ]
    for build in builds:
        stepped_is_the_value(build(make_optimizer()))
        stepped_is_the_value(build(make_optimizer(dtype=torch.float64)))


def drawn(rng: random.Random, o: Any, depth: int) -> Any:
    """A composition of compositions, down to single schedules."""
    kind = rng.randrange(4) if depth else 0
    if kind == 1:
        ramp, start = rng.choice(sorted(RAMPS)), rng.choice([0.0, 0.1])
        return ours.warmup(drawn(rng, o, depth - 1), rng.randint(0, 8), ramp, start_factor=start)
    if kind == 2:
        milestones = sorted(rng.sample(range(1, 45), rng.randint(0, 2)))
        return ours.SequentialLR(o, [drawn(rng, o, depth - 1) for _ in range(len(milestones) + 1)], milestones)
    scaling: list[Any] = [
        lambda: ours.StepLR(o, rng.randint(1, 9), 0.5),
        lambda: ours.ExponentialLR(o, 0.9),
        lambda: ours.LinearLR(o, rng.choice([0.1, 0.5]), rng.choice([1.0, 0.3]), rng.randint(1, 12)),
        lambda: ours.PolynomialLR(o, rng.randint(60, 90), 2.0),
    ]
    if kind == 3:
        return ours.ChainedScheduler([rng.choice(scaling)() for _ in range(rng.randint(1, 3))])
    setting: list[Any] = [
        lambda: ours.CosineAnnealingLR(o, rng.randint(60, 90), 0.001),
        lambda: ours.CosineAnnealingWarmRestarts(o, rng.randint(2, 9), 2),
        lambda: ours.SymbolicLR(o, "base_lr*(1 + cos(pi*t/30))/2 + 0.001"),
        lambda: ours.LambdaLR(o, lambda i: 1 / (1 + i) if i < 7 else 0.1),
        lambda: ours.get_rex_schedule(o, rng.randint(0, 4), rng.randint(10, 60)),
    ]
    return rng.choice(scaling + setting)()


@pytest.mark.parametrize("seed", range(12))
def test_compositions_of_compositions(seed: int) -> None:
    """Stepped, as values, attached, and resumed at a step they agree."""

    def build(tensor: bool = False) -> Any:
        optimizer = make_optimizer("SGD", torch.float64 if tensor else None)
        return drawn(random.Random(seed), optimizer, 3)

    schedule, place = build(), random.Random(seed).randrange(50)
    wanted = [[schedule.value(i, group) for group in (0, 1)] for i in range(55)]
    saved: Any = None
    for i in range(55):
        if i == place:
            saved = copy.deepcopy((schedule.optimizer.state_dict(), schedule.state_dict()))
        assert scheduled(schedule.optimizer)[:2] == near(wanted[i]), i
        step(schedule)
    moved = build(tensor=True)
    optimizer = attach(moved)
    assert [row[:2] for row in run(moved, 55, attached=True)] == rows(wanted)
    resumed = build()
    optimizer = attach(resumed)
    optimizer.load_state_dict(saved[0])
    resumed.load_state_dict(saved[1])
    assert [row[:2] for row in run(resumed, 5, attached=True)] == rows(wanted[place : place + 5])


def test_a_warm_up_multiplies_in_a_chain_with_a_schedule_that_counts_all_steps() -> None:
    optimizer = make_optimizer()
    chain = ours.ChainedScheduler([ours.LinearLR(optimizer, 0.1, 1.0, 10), ours.CosineAnnealingLR(optimizer, 80)])
    stepped_is_the_value(chain)
    with pytest.raises(TypeError, match="Warmup at index 0 does not scale the lr it finds"):
        ours.ChainedScheduler([ours.warmup(ours.StepLR(optimizer, 9), 4), ours.StepLR(optimizer, 5)]).expression()


def test_past_its_end_nothing_is_updated() -> None:
    optimizer = make_optimizer("SGD")
    schedule = ours.warmup(ours.OneCycleLR(optimizer, 0.3, 6), 4)
    optimizer.attach(schedule)
    run(schedule, 10, attached=True)
    before = copy.deepcopy((optimizer.param_groups, optimizer.state_dict()["state"]))
    with pytest.raises(ValueError, match="Tried to step 7 times"):
        run(schedule, 1, attached=True)
    torch.testing.assert_close((optimizer.param_groups, optimizer.state_dict()["state"]), before, rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch's own
@kinds
def test_in_a_compiled_loop(tensor: bool) -> None:
    torch.compiler.reset()
    model = torch.nn.Linear(3, 1).double()
    lr = torch.tensor(0.1, dtype=torch.float64) if tensor else 0.1
    optimizer = compiled_optim.SGD(model.parameters(), lr=lr, momentum=0.9, compiled=True)
    schedule = ours.warmup(ours.CosineAnnealingLR(optimizer, 20), 5)

    @torch.compile(backend="eager")
    def train(x: torch.Tensor) -> None:
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()

    for i in range(15):
        assert float(optimizer.param_groups[0]["lr"]) == near(schedule.value(i))
        train(torch.ones(2, 3, dtype=torch.float64))


# ---- what is refused


@pytest.mark.parametrize(
    ("schedule", "arguments", "error", "match"),
    [
        (
            lambda o: theirs.StepLR(o, 3),
            (5,),
            TypeError,
            "compiled_optim.lr_scheduler, got a torch.optim.lr_scheduler.S",
        ),
        (lambda o: 3, (5,), TypeError, "schedule must be a scheduler of .* got a builtins.int"),
        (lambda o: ours.ReduceLROnPlateau(o), (5,), ValueError, "Warmup does not support `ReduceLROnPlateau`"),
        (lambda o: ours.StepLR(o, 3), (-1,), ValueError, "steps must be an integer of at least 0, got -1"),
        (lambda o: ours.StepLR(o, 3), (2.5,), ValueError, "steps must be an integer of at least 0, got 2.5"),
        (lambda o: ours.StepLR(o, 3), (5, "steep"), ValueError, r"kind must be one of \['linear', .*\], got 'steep'"),
    ],
)
def test_refusals(schedule: Any, arguments: Any, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        ours.warmup(schedule(make_optimizer()), *arguments)


def test_more_refusals() -> None:
    schedule = ours.StepLR(make_optimizer(), 3)
    for name in ("start_factor", "power"):
        with pytest.raises(ValueError, match=f"{name} must be at least 0, got -1"):
            ours.warmup(schedule, 5, **{name: -1})
    step(schedule)
    with pytest.raises(ValueError, match="schedule must be at its first step, got a StepLR at step 1: to resume"):
        ours.warmup(schedule, 5)
    assert scheduled(schedule.optimizer)[:2] == near(list(LRS))
