"""The parameter shapes of the models that are timed."""

from __future__ import annotations

Shapes = list[tuple[int, ...]]

SMALL: Shapes = [(64, 64), (64,)] * 50
MEDIUM: Shapes = [(512, 512), (512,)] * 10
TINY: Shapes = [(64, 16), (64,), (64, 64), (64,), (4, 64), (4,)]
LORA: Shapes = [(8, 768), (768, 8)] * 48  # pairs of rank 8, four in each of twelve layers


def resnet50() -> Shapes:
    """161 tensors, 25.6M elements (He et al. 2015)."""
    shapes: Shapes = [(64, 3, 7, 7), (64,), (64,)]
    width = 64
    for planes, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            for out, into, kernel in ((planes, width, 1), (planes, planes, 3), (planes * 4, planes, 1)):
                shapes += [(out, into, kernel, kernel), (out,), (out,)]
            if block == 0:
                shapes += [(planes * 4, width, 1, 1), (planes * 4,), (planes * 4,)]
            width = planes * 4
    return [*shapes, (1000, 2048), (1000,)]


def gpt2_small() -> Shapes:
    """148 tensors, 124M elements (Radford et al. 2019)."""
    d = 768
    layer: Shapes = [(d,), (d,), (d, 3 * d), (3 * d,), (d, d), (d,), (d,), (d,), (d, 4 * d), (4 * d,), (4 * d, d), (d,)]
    return [(50257, d), (1024, d), *layer * 12, (d,), (d,)]


# One element each: what is left is the cost of the host.
ONES = [(1,)] * 161
MANY_ONES = [(1,)] * 10_000
