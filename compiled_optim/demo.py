"""Trains one small network with four optimizers side by side and compares accuracy, losses and step times.

``python -m compiled_optim.demo`` (or ``make demo``) trains a convolutional net on scikit-learn's handwritten digits
with torch's AdamW, torch's fused AdamW, and ours eager and compiled. All start from the same weights and see the same
batches. The contestants take turns on every batch, so that a machine that slows down slows all of them down.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import compiled_optim

WARMUP = 5  # steps left out of the medians: the first one creates state and may compile
BATCH = 64
LR = 1e-3
Split = tuple[Tensor, Tensor, Tensor, Tensor]
MakeOptimizer = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]

REFERENCE, RIVAL, EAGER, COMPILED = "torch default", "torch fused=True", "ours eager", "ours compiled=True"
CONTESTANTS: dict[str, MakeOptimizer] = {
    REFERENCE: lambda params: torch.optim.AdamW(params, lr=LR),
    RIVAL: lambda params: torch.optim.AdamW(params, fused=True, lr=LR),
    EAGER: lambda params: compiled_optim.AdamW(params, compiled=False, lr=LR),
    COMPILED: lambda params: compiled_optim.AdamW(params, compiled=True, lr=LR),
}


@dataclass
class Contestant:
    """A copy of the model, its optimizer, and what was seen of it."""

    name: str
    model: nn.Module
    optimizer: torch.optim.Optimizer
    construction: float
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    accuracy: float = 0.0

    @classmethod
    def create(cls, name: str, model: nn.Module) -> Contestant:
        model = copy.deepcopy(model)
        start = time.perf_counter()
        optimizer = CONTESTANTS[name](model.parameters())
        return cls(name, model, optimizer, time.perf_counter() - start)

    def train(self, images: Tensor, labels: Tensor) -> None:
        """One training step; only ``optimizer.step()`` is timed."""
        self.optimizer.zero_grad()
        loss = cross_entropy(self.model(images), labels)
        loss.backward()  # type: ignore[no-untyped-call]
        start = time.perf_counter()
        self.optimizer.step()
        self.seconds.append(time.perf_counter() - start)
        self.losses.append(loss.item())

    def evaluate(self, images: Tensor, labels: Tensor) -> None:
        with torch.no_grad():
            self.accuracy = (self.model(images).argmax(1) == labels).double().mean().item()

    @property
    def median_ms(self) -> float:
        return 1e3 * statistics.median(self.seconds[WARMUP:] or self.seconds)

    @property
    def first_step_ms(self) -> float:
        return 1e3 * (self.construction + self.seconds[0])


def needs(package: str) -> SystemExit:
    return SystemExit(f"The demo needs {package}, which is not installed. Run: pip install compiled-optim[demo]")


def load_digits() -> Split:
    """Training images and labels, test images and labels: 1797 images of 8x8 pixels, a quarter of them for the test."""
    try:
        from sklearn.datasets import load_digits as load
        from sklearn.model_selection import train_test_split
    except ImportError:
        raise needs("scikit-learn") from None
    data = load()
    train_x, test_x, train_y, test_y = train_test_split(
        data.images, data.target, test_size=0.25, random_state=0, stratify=data.target
    )

    def images(array: object) -> Tensor:
        return torch.as_tensor(array, dtype=torch.float32).unsqueeze(1) / 16

    def labels(array: object) -> Tensor:
        return torch.as_tensor(array, dtype=torch.int64)

    return images(train_x), labels(train_y), images(test_x), labels(test_y)


def make_model() -> nn.Module:
    """Four convolutions with batch norm and two linear layers: 20 parameter tensors, about 0.4 million elements."""
    layers: list[nn.Module] = []
    for inputs, outputs, pool in [(1, 32, False), (32, 64, True), (64, 128, False), (128, 128, True)]:
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU()]
        layers += [nn.MaxPool2d(2)] if pool else []
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(512, 256), nn.ReLU(), nn.Linear(256, 10))


@contextmanager
def progress(total: int) -> Iterator[Callable[[], object]]:
    """A bar on standard error (tqdm's if it is installed); yields the function that moves it by one batch."""
    try:
        from tqdm import tqdm
    except ImportError:
        done = 0

        def advance() -> None:
            nonlocal done
            done += 1
            if done % max(1, total // 40) == 0 or done == total:
                filled = 40 * done // total
                print(f"\r[{'#' * filled:<40}] {done}/{total} batches", end="", file=sys.stderr, flush=True)

        yield advance
        print(file=sys.stderr)
    else:
        with tqdm(total=total, unit="batch", desc="training 4 models", mininterval=0.5) as bar:
            yield bar.update


def train(contestants: list[Contestant], split: Split, epochs: int) -> None:
    train_x, train_y, test_x, test_y = split
    generator = torch.Generator().manual_seed(0)
    turns = 0
    with progress(epochs * -(-len(train_x) // BATCH)) as advance:
        for _ in range(epochs):
            order = torch.randperm(len(train_x), generator=generator)
            for start in range(0, len(order), BATCH):
                batch = order[start : start + BATCH]
                first = turns % len(contestants)
                for contestant in contestants[first:] + contestants[:first]:
                    contestant.train(train_x[batch], train_y[batch])
                turns += 1
                advance()
    for contestant in contestants:
        contestant.model.eval()
        contestant.evaluate(test_x, test_y)


def table(contestants: list[Contestant]) -> str:
    by_name = {contestant.name: contestant for contestant in contestants}
    reference, rival = by_name[REFERENCE], by_name[RIVAL]
    rows = [("AdamW", "test acc.", "max loss diff", "median step", "vs default", "vs fused", "first step")]
    for this in contestants:
        difference = max(abs(a - b) for a, b in zip(this.losses, reference.losses, strict=True))
        rows.append(
            (
                this.name,
                f"{this.accuracy:.2%}",
                "-" if this is reference else f"{difference:.1e}",
                f"{this.median_ms:.3f} ms",
                f"{this.median_ms / reference.median_ms:.2f}x",
                f"{this.median_ms / rival.median_ms:.2f}x",
                f"{this.first_step_ms:.1f} ms",
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])


def cache_state(optimizer: torch.optim.Optimizer) -> str:
    """Whether the compiled contestant's first step paid for a compilation."""
    origins = {row.origin for row in compiled_optim.explain(optimizer) if row.origin}
    if "compiled" in origins:
        state = "cold: its first step compiled a kernel; the next run finds it on disk, unless that is disabled"
    elif origins:
        state = f"warm: the kernel came from {' and '.join(sorted(origins))}, nothing was compiled"
    else:
        state = "not used: no kernel ran, see the reasons below"
    return f"Kernel cache {state}.\n{compiled_optim.cache_info()} in {compiled_optim.cache_dir() or 'memory only'}"


def plot(contestants: list[Contestant], path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    FigureCanvasAgg(figure)  # draws to memory: no display is needed
    curves, bars = figure.subplots(1, 2)
    for i, this in enumerate(contestants):  # the curves coincide, so later ones are thinner and dashed
        curves.plot(this.losses, label=this.name, linewidth=5 - 1.2 * i, linestyle=("-", "-", "--", ":")[i], alpha=0.8)
    curves.set(title="Training loss (same weights, same batches)", xlabel="step", ylabel="loss", yscale="log")
    curves.legend()
    times = [this.median_ms for this in contestants]
    drawn = bars.barh([this.name for this in contestants], times, color=[f"C{i}" for i in range(len(contestants))])
    bars.bar_label(drawn, labels=[f"{value:.3f} ms" for value in times], padding=3)
    bars.invert_yaxis()
    bars.margins(x=0.2)
    bars.set(title="Median time of optimizer.step()", xlabel="milliseconds")
    figure.savefig(path, format="png")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m compiled_optim.demo", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--epochs", type=int, default=15, help="passes over the 1347 training images (default: 15)")
    parser.add_argument("--threads", type=int, help="threads for torch and for the kernels (default: torch's choice)")
    parser.add_argument("--output", type=Path, default=Path("demo.png"), help="where the plot goes (default: demo.png)")
    arguments = parser.parse_args(argv)
    if arguments.epochs < 1 or (arguments.threads is not None and arguments.threads < 1):
        parser.error("--epochs and --threads must be at least 1")
    try:
        import matplotlib  # noqa: F401  (asked for now, not after the training)
    except ImportError:
        raise needs("matplotlib") from None
    split = load_digits()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    model = make_model()
    # The first optimizer of a process pays for imports inside torch. None of the contestants should.
    throwaway = nn.Parameter(torch.zeros(1))
    throwaway.grad = torch.zeros(1)
    torch.optim.SGD([throwaway]).step()

    contestants = [Contestant.create(name, model) for name in CONTESTANTS]
    tensors = list(model.parameters())
    elements = sum(tensor.numel() for tensor in tensors)
    print(
        f"AdamW on {len(tensors)} tensors, {elements:,} elements; {arguments.epochs} epochs of {len(split[0])} images; "
        f"torch {torch.__version__}, {torch.get_num_threads()} threads"
    )
    train(contestants, split, arguments.epochs)
    plot(contestants, arguments.output)
    compiled = contestants[-1].optimizer
    print(f"\n{table(contestants)}\n\nfirst step = construction + first step(). {cache_state(compiled)}")
    print(f"\n{compiled_optim.explain(compiled)}\n\nPlot written to {arguments.output}")


if __name__ == "__main__":
    main()
