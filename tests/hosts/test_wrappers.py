"""Optimizers that wrap another, and two more loops: ignite's engine and skorch's estimator."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader
from training import MISSING, Way, assert_same, digits, network

pytest.importorskip("lightning", **MISSING)  # a sign that frameworks are installed at all

LR = 0.01


def train(optimizer: Any, model: Any, epochs: int = 2) -> None:
    """With closures, which each wrapper calls as often as it wants."""
    for _ in range(epochs):
        for images, labels in DataLoader(digits(dtype=torch.float64), batch_size=16):

            def closure(images: Any = images, labels: Any = labels) -> Any:
                optimizer.zero_grad()
                loss = cross_entropy(model(images), labels)
                loss.backward()
                return loss

            optimizer.step(closure)


def compare(way: Way, wrap: Any, name: str = "AdamW", **options: Any) -> Any:
    """Trains in the wrapper that ``wrap(build, parameters)`` makes; returns both."""
    models = [network(dtype=torch.float64) for _ in range(2)]
    builds = (way.of(name), getattr(torch.optim, name))
    wrappers = [wrap(build, model.parameters()) for build, model in zip(builds, models, strict=True)]
    for wrapper, model in zip(wrappers, models, strict=True):
        train(wrapper, model, **options)
    assert_same(*models, tolerance=1e-12)
    way.check(wrappers[0])
    return wrappers


@pytest.mark.host("pytorch_optimizer", "Lookahead, and its checkpoint")
def test_lookahead(way: Way) -> None:
    wrappers = pytest.importorskip("pytorch_optimizer", **MISSING)

    def wrap(build: Any, params: Any) -> Any:
        return wrappers.Lookahead(build(params, lr=LR), k=3, alpha=0.5)

    ours, stock = compare(way, wrap)
    resumed = wrap(way.of("AdamW"), network(dtype=torch.float64).parameters())
    resumed.load_state_dict(stock.state_dict())
    for saved in (ours, stock):
        state = saved.state_dict()["base_optimizer"]["state"][0]
        torch.testing.assert_close(
            resumed.state_dict()["base_optimizer"]["state"][0]["exp_avg"], state["exp_avg"], rtol=1e-10, atol=1e-12
        )


@pytest.mark.host("pytorch_optimizer", "SAM, around SGD with momentum")
def test_sam(way: Way) -> None:
    wrappers = pytest.importorskip("pytorch_optimizer", **MISSING)

    def wrap(build: Any, params: Any) -> Any:
        class Base(torch.optim.Optimizer):  # SAM builds the optimizer itself
            def __new__(cls, params: Any, **options: Any) -> Any:
                return build(params, **options)

        return wrappers.SAM(list(params), Base, lr=LR, momentum=0.9)

    compare(way, wrap, "SGD")


@pytest.mark.host("schedulefree", "ScheduleFreeWrapper around SGD with momentum")
def test_schedule_free(way: Way) -> None:
    schedulefree = pytest.importorskip("schedulefree", **MISSING)

    def wrap(build: Any, params: Any) -> Any:
        wrapper = schedulefree.ScheduleFreeWrapper(
            build(params, lr=LR, momentum=0.5), momentum=0.9, weight_decay_at_y=0.01
        )
        wrapper.train()
        return wrapper

    for wrapper in compare(way, wrap, "SGD"):
        wrapper.eval()


@pytest.mark.host("ignite", "`create_supervised_trainer`, its schedules and its EMA")
def test_ignite(way: Way) -> None:
    pytest.importorskip("ignite", **MISSING)
    from ignite.engine import Events, create_supervised_trainer
    from ignite.handlers import EMAHandler, LinearCyclicalScheduler

    models, averages = [], []
    for build in (way.of("AdamW"), torch.optim.AdamW):
        model = network(dtype=torch.float64)
        optimizer = build(model.parameters(), lr=LR)
        trainer = create_supervised_trainer(model, optimizer, cross_entropy)
        trainer.add_event_handler(Events.ITERATION_STARTED, LinearCyclicalScheduler(optimizer, "lr", 1e-3, LR, 8))
        ema = EMAHandler(model, momentum=0.1)
        ema.attach(trainer, event=Events.ITERATION_COMPLETED)
        trainer.run(DataLoader(digits(dtype=torch.float64), batch_size=16), max_epochs=2)
        models.append(model)
        averages.append(ema.ema_model)
        if model is models[0]:
            way.check(optimizer)
    assert_same(*models, tolerance=1e-12)
    assert_same(*averages, tolerance=1e-12)


@pytest.mark.host("skorch", "NeuralNetClassifier in a pipeline of scikit-learn, with options by their names")
def test_skorch(way: Way) -> None:
    skorch = pytest.importorskip("skorch", **MISSING)
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    import compiled_optim

    images, labels = (t.numpy() for t in digits().tensors)
    fitted = []
    for kind, options in ((compiled_optim.AdamW, way.options()), (torch.optim.AdamW, {})):
        options = {f"optimizer__{name}": value for name, value in (options | {"betas": (0.8, 0.99)}).items()}
        net = skorch.NeuralNetClassifier(
            network(),
            criterion=torch.nn.CrossEntropyLoss,
            optimizer=kind,
            lr=LR,
            max_epochs=3,
            train_split=None,
            batch_size=16,
            verbose=0,
            **options,
        )
        fitted.append(make_pipeline(StandardScaler(), net).fit(images, labels)[-1])
    assert_same(fitted[0].module_, fitted[1].module_, 1e-5)
    assert fitted[0].optimizer_.param_groups[0]["betas"] == (0.8, 0.99)
    way.check(fitted[0].optimizer_)
