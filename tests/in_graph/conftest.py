from __future__ import annotations

import warnings
from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def _dynamo() -> Iterator[None]:
    torch.compiler.reset()
    with warnings.catch_warnings():
        # torch's own: of the loss that lives on over the break at backward()
        warnings.filterwarnings("ignore", "The .grad attribute of a Tensor that is not a leaf")
        yield
    torch.compiler.reset()
