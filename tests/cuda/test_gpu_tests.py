"""Tests of `tests/gpu` on the stand-in for a GPU, so that it is known that they run and can pass."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

stand_in = pytest.importorskip("stand_in", exc_type=ImportError)
sys.path.insert(0, str(Path(__file__).parents[1] / "gpu"))

from test_equality import (  # noqa: E402, F401
    test_a_grad_scaler,
    test_bfloat16_parameters_with_float32_state,
    test_capturable,
    test_memory_layouts,
    test_no_step_waits_for_the_device,
    test_not_finite_gradients,
    test_param_groups_are_one_launch,
    test_parameters_on_the_host_beside_those_on_the_device,
    test_sparse_gradients,
)
from test_gpu_graphs import (  # noqa: E402, F401
    test_a_first_step_in_a_graph,
    test_a_grad_scaler_in_the_graph,
    test_a_graph_brings_its_words_again,
    test_a_schedule_moves_with_each_replay,
    test_an_average_of_weights,
    test_betas_that_are_tensors,
    test_other_steps_between_replays,
    test_replays_are_steps,
    test_state_that_is_carried,
    test_what_the_host_counts_cannot_be_captured,
)
from test_gpu_one_pass import (  # noqa: E402, F401
    test_a_grad_scaler_in_one_pass,
    test_a_step_that_is_not_finite_is_skipped,
    test_clipping_and_averaging_wait_for_nothing,
    test_masters,
    test_replays_follow_the_gradients,
    test_rounding_at_random,
)


@pytest.fixture
def device(gpu: Any) -> Any:
    yield stand_in.DEVICES[0]
    assert gpu.error is None


@pytest.fixture
def without_waiting() -> Any:
    return stand_in.no_waiting


@pytest.fixture
def capture() -> Any:
    return stand_in.capture
