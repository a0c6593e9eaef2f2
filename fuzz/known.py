"""Where a step of ours and torch's may differ, each with the reason. What is not listed is a finding."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass
class Finding:
    """``kind``: "crash", "half step", "half load", "odd error", "value", "ours raises" or "torch raises"."""

    kind: str
    subject: str
    seed: str
    changes: list[str]
    message: str
    stock: str = ""  # what torch raised


ODD_ERRORS = (SystemError, AssertionError, UnboundLocalError, AttributeError, IndexError, KeyError, ZeroDivisionError)


# kind, patterns of the message and of torch's error, and why it is no fault
_LISTED = [
    ("value", r", not -?(nan|inf) ", "", "ours is finite where torch's is not"),
    ("value", r"(nan|inf).* \(torch\.complex", "", "an element that is not finite: a pair of reals here"),
    ("torch raises", "", "API has changed, `state_steps`", "a step count may be a number"),
    (
        "torch raises",
        "",
        r"Use \.reshape\(\.\.\.\) instead",
        "LBFGS takes parameters and gradients that are not contiguous",
    ),
    ("odd error", "is missing beside its", "", "a KeyError that names the state, where torch has an AttributeError"),
    ("ours raises", "must be on cpu", "", "state on another device is refused by name; torch computes on meta"),
    (
        "ours raises",
        r"LBFGS: expected '\w+' in the state after",
        "",
        "LBFGS refuses state without a key that torch does without in this step",
    ),
]


def known(f: Finding) -> str:
    """Why this is no fault, or an empty string."""
    for kind, message, stock, reason in _LISTED:
        if f.kind == kind and re.search(message, f.message) and re.search(stock, f.stock):
            return reason
    return ""
