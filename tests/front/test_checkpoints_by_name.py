"""Checkpoints of optimizers that were given ``named_parameters()``: parameters are found by name."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from beside_torch import assert_equal, parameter, set_gradients, tensors, train
from cases import CLASSES, KINDS, oracle, rich_options

from compiled_optim import SGD, AdamW, Optimizer

NAMES = ["embedding", "hidden", "head"]
SHAPES = [(3, 4), (5, 2), (1, 1)]
Groups = list[dict[str, Any]]


def named(values: list[Any], *groups: tuple[str, ...], **options: Any) -> Groups:
    """Param groups of these names, each with the options at its place."""
    params = dict(zip(NAMES, values, strict=True))
    own = [{k: v[i] for k, v in options.items()} for i in range(len(groups))]
    return [{"params": [(n, params[n]) for n in g], **o} for g, o in zip(groups, own, strict=True)]


def both_ways(*groups: tuple[str, ...]) -> tuple[list[Any], list[Any], Groups, Groups]:
    """Two lists of equal parameters; param groups of the first in one order, of the second in these groups."""
    values = tensors(SHAPES)
    first, second = ([parameter(v) for v in values] for _ in range(2))
    return first, second, named(first, tuple(NAMES)), named(second, *groups)


def saved_by(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    return copy.deepcopy(optimizer.state_dict())  # what is loaded stays the same tensors


@pytest.mark.parametrize("stock", [False, True], ids=["ours", "torch's"])
@pytest.mark.parametrize("cls", CLASSES, ids=lambda c: c.__name__)
def test_another_order_goes_on_as_if_nothing_had_happened(cls: type[Optimizer], stock: bool) -> None:
    options = rich_options(cls)
    first, second, in_order, mixed = both_ways(("head", "embedding", "hidden"))
    source = (oracle(cls) if stock else cls)(in_order, **options)
    train(2, (source, first))
    with torch.no_grad():
        torch._foreach_copy_(second, first)
    target = cls(mixed, **options)
    target.load_state_dict(saved_by(source))
    assert target.param_groups[0]["param_names"] == ["head", "embedding", "hidden"]
    train(2, (source, first), (target, second))
    assert_equal(second, first, 1e-6)  # of torch's state in float32


@pytest.mark.parametrize("cls", KINDS, ids=lambda c: c.__name__)
def test_another_split_takes_the_options_of_its_parameters(cls: type[Optimizer]) -> None:
    first, second, _, split = both_ways(("head", "hidden"), ("embedding",))
    source = cls(named(first, ("embedding",), ("hidden",), ("head",), lr=[0.5, 0.25, 0.25]))
    train(2, (source, first))
    with torch.no_grad():
        torch._foreach_copy_(second, first)
    target = cls(split)
    target.load_state_dict(saved_by(source))
    assert [group["lr"] for group in target.param_groups] == [0.25, 0.5]
    train(2, (source, first), (target, second))
    assert_equal(second, first)


def test_one_group_is_split_and_each_part_has_a_learning_rate_of_its_own() -> None:
    first, _, in_order, split = both_ways(("head",), ("embedding", "hidden"))
    source = torch.optim.AdamW(in_order, lr=torch.tensor(0.5))
    train(1, (source, first))
    target = AdamW(split)
    target.load_state_dict(saved_by(source))
    rates = [group["lr"] for group in target.param_groups]
    assert [*map(float, rates)] == [0.5, 0.5]
    rates[0].fill_(0.125)
    assert float(rates[1]) == 0.5


def test_the_same_order_gives_what_torch_gives() -> None:
    """Also where state has another shape: torch loads it, and the step says so."""
    first, second, in_order, again = both_ways(tuple(NAMES))
    source = torch.optim.AdamW(in_order, lr=0.5)
    train(1, (source, first))
    saved = source.state_dict()
    saved["state"][0]["exp_avg"] = torch.zeros(7)
    ours, stock = AdamW(again), torch.optim.AdamW(again)
    for optimizer in (ours, stock):
        optimizer.load_state_dict(saved)
    for p in second:
        for name, value in stock.state[p].items():
            assert torch.equal(ours.state[p][name], value)
    set_gradients(second)
    with pytest.raises(RuntimeError, match=r"'exp_avg' of the parameter of shape \(3, 4\).*must have its shape"):
        ours.step()


@pytest.mark.parametrize("saved_names", [True, False])
def test_without_names_on_both_sides_the_place_counts(saved_names: bool) -> None:
    first, second, in_order, mixed = both_ways(("head", "embedding", "hidden"))
    source = torch.optim.SGD(in_order if saved_names else first, momentum=0.5)
    train(1, (source, first))
    saved = source.state_dict()
    params = second if saved_names else mixed
    ours, stock = SGD(params, momentum=0.5), torch.optim.SGD(params, momentum=0.5)
    ours.load_state_dict(saved)
    stock.load_state_dict(saved)
    for p in second:
        assert torch.equal(ours.state[p]["momentum_buffer"], stock.state[p]["momentum_buffer"])
    assert ours.param_groups[0].get("param_names") == stock.param_groups[0].get("param_names")


def test_what_does_not_match_is_listed() -> None:
    first, second, in_order, mixed = both_ways(("head", "hidden", "embedding"))
    source = AdamW(in_order)
    train(1, (source, first))
    saved = source.state_dict()
    saved["param_groups"][0]["param_names"] = ["embedding", "hidden", "old head"]
    saved["state"][1]["exp_avg_sq"] = torch.zeros(2, 5)
    target = AdamW(mixed, lr=torch.tensor(0.25))
    before, rate = copy.deepcopy(target.state_dict()), target.param_groups[0]["lr"]
    with pytest.raises(ValueError, match="the parameters of the checkpoint must be those of the optimizer") as error:
        target.load_state_dict(saved)
    for part in (
        "missing: head;",
        "unexpected: old head;",
        "of another shape: hidden (its 'exp_avg_sq' has (2, 5), the parameter (5, 2))",
        "to load it by position, as torch.optim does, remove 'param_names' from its param groups",
    ):
        assert part in str(error.value)
    assert target.state_dict() == before
    assert target.param_groups[0]["lr"] is rate
    del saved["param_groups"][0]["param_names"]
    target.load_state_dict(saved)
    assert torch.equal(target.state[second[2]]["exp_avg"], saved["state"][0]["exp_avg"])


def test_options_that_differ_in_one_group_are_named() -> None:
    first, second, _, joined = both_ways(("head", "hidden", "embedding"))
    source = AdamW(named(first, ("embedding",), ("hidden", "head"), weight_decay=[0.0, 0.5]))
    target = AdamW(joined)
    with pytest.raises(
        ValueError, match=r"param group 0 .* saved groups 1 and 0, .* same 'weight_decay', got 0.5 and 0.0"
    ):
        target.load_state_dict(saved_by(source))
    assert target.param_groups[0]["weight_decay"] == 0.01
    assert second[0] not in target.state


def test_names_that_are_no_help_are_refused() -> None:
    _, _, in_order, mixed = both_ways(("head", "hidden", "embedding"))
    saved = AdamW(in_order).state_dict()
    target = AdamW(mixed)
    for names, message in (
        (["embedding", "embedding", "head"], "'param_names' must be unique, got 'embedding' twice"),
        (["embedding", "hidden"], "must name its parameters, got 2 names for 3 parameters"),
    ):
        saved["param_groups"][0]["param_names"] = names
        with pytest.raises(ValueError, match=message):
            target.load_state_dict(saved)


def test_hooks_see_the_layout_of_torch() -> None:
    first, second, in_order, mixed = both_ways(("head", "embedding", "hidden"))
    source = AdamW(in_order)
    train(1, (source, first))
    saved = source.state_dict()
    renamed = copy.deepcopy(saved)
    renamed["param_groups"][0]["param_names"] = [f"module.{name}" for name in NAMES]
    target = AdamW(mixed)
    seen: list[Any] = []

    def without_prefix(optimizer: Any, state_dict: Any) -> Any:
        seen.append(state_dict["param_groups"][0]["param_names"])
        return saved

    target.register_load_state_dict_pre_hook(without_prefix)
    target.register_load_state_dict_post_hook(lambda optimizer: seen.append(optimizer.param_groups[0]["param_names"]))
    target.load_state_dict(renamed)
    assert seen == [[f"module.{name}" for name in NAMES], ["head", "embedding", "hidden"]]
    assert torch.equal(target.state[second[0]]["exp_avg"], saved["state"][0]["exp_avg"])


@pytest.mark.parametrize("options", [{"state_dtype": torch.bfloat16}, {"ema_decay": 0.5}], ids=str)
def test_state_in_other_dtypes_is_found_by_name_too(options: dict[str, Any]) -> None:
    first, second, in_order, mixed = both_ways(("head", "embedding", "hidden"))
    source = AdamW(in_order, **options)
    train(2, (source, first))
    target = AdamW(mixed, **options)
    target.load_state_dict(saved_by(source))
    for p, q in zip(first, second, strict=True):
        for name, value in source.state[p].items():
            assert target.state[q][name].dtype == value.dtype
            assert torch.equal(target.state[q][name], value)


@pytest.mark.parametrize("flat", [False, True])
def test_the_distributed_checkpoint_finds_parameters_by_itself(flat: bool) -> None:
    """What it loads is in the order of the optimizer, with the list of names as it was saved."""
    state_dicts = pytest.importorskip("torch.distributed.checkpoint.state_dict", reason="torch without distributed")
    options = state_dicts.StateDictOptions(flatten_optimizer_state_dict=flat)
    models = [torch.nn.Sequential(*(torch.nn.Linear(2, 2, bias=False) for _ in range(3))) for _ in range(2)]
    first, second = (dict(model.named_parameters()) for model in models)
    source = AdamW(first.items())
    set_gradients([*first.values()])
    source.step()
    order = ["2.weight", "0.weight", "1.weight"]
    target = AdamW([(name, second[name]) for name in order])
    saved = copy.deepcopy(state_dicts.get_optimizer_state_dict(models[0], source, options=options))
    state_dicts.set_optimizer_state_dict(models[1], target, saved, options=options)
    for name, p in first.items():
        assert torch.equal(target.state[second[name]]["exp_avg"], source.state[p]["exp_avg"])
    assert target.param_groups[0]["param_names"] == order


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._fsdp_wrapped_module."])
@pytest.mark.parametrize("on_both", [False, True])
def test_what_wrappers_of_a_model_add_makes_no_difference(prefix: str, on_both: bool) -> None:
    first, second, in_order, mixed = both_ways(("head",), ("embedding", "hidden"))
    source = AdamW(in_order)
    train(1, (source, first))
    saved = saved_by(source)
    saved["param_groups"][0]["param_names"] = [f"{prefix}{name}" for name in NAMES]
    target = AdamW(mixed)
    if on_both:
        for group in target.param_groups:
            group["param_names"] = [f"{prefix}{name}" for name in group["param_names"]]
    own = [group["param_names"] for group in target.param_groups]
    target.load_state_dict(saved)
    assert [group["param_names"] for group in target.param_groups] == own
    for p, q in zip(first, second, strict=True):
        assert torch.equal(target.state[q]["exp_avg"], source.state[p]["exp_avg"])


def test_a_module_that_is_called_module_is_no_wrapper() -> None:
    first, second, _, _ = both_ways(("head",), ("embedding", "hidden"))
    names = ["module.weight", "weight", "head"]
    source = AdamW([{"params": [(n, p)]} for n, p in zip(names, first, strict=True)])
    train(1, (source, first))
    target = AdamW([*zip(reversed(names), reversed(second), strict=True)])
    target.load_state_dict(saved_by(source))
    for p, q in zip(first, second, strict=True):
        assert torch.equal(target.state[q]["exp_avg"], source.state[p]["exp_avg"])
