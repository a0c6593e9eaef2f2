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
    ("torch raises", "", r"Use \.reshape\(\.\.\.\) instead", "LBFGS takes tensors that are not contiguous"),
    ("torch raises", "", "dot : expected both vectors", "LBFGS computes in the dtype of its gradient"),
    ("torch raises", "", "expected dtype .* for `end`", "state may have another dtype than its parameter"),
    ("torch raises", "", "must be Number, not Fraction", "an option may be any real number"),
    ("torch raises", "", r"add\(sparse, dense\) is not supported", "a sparse gradient may be applied as a dense one"),
    ("torch raises", "", "KeyError: '(sum|step)'", "Adagrad makes state that was taken away, as torch's newer one"),
    ("torch raises", "", "ZeroDivisionError", "an empty parameter is no error"),
    ("torch raises", "", "'NoneType' object has no attribute 'lerp_'", "state of None is made anew"),
    ("torch raises", "", "interpreted as an integer|converted to an index", "an integer may be a float"),
    ("torch raises", "", r"clamp\(\) received an invalid combination", "an option may be any real number"),
    ("torch raises", "", "expected dtype .* for `weight`", "an option may be a tensor of any dtype"),
    ("ours raises", "adjust_lr_fn must be None or one of", "", "torch takes what it does not know for a ratio of 1"),
    ("odd error", "is missing beside its", "", "a KeyError that names the state, where torch has an AttributeError"),
    ("odd error", "a param group must have", "", "a KeyError that names the option"),
    ("ours raises", "must be on cpu", "", "state on another device is refused by name; torch computes on meta"),
    ("ours raises", r"LBFGS: expected '\w+' in the state after", "", "torch does without that key in this step"),
    ("ours raises", "must not be lazily conjugated", "", "refused by name, as by torch's Adam but not its SGD"),
    ("ours raises", "(dampening|initial_accumulator_value) must be", "", "torch does not read it in this step"),
]


def known(f: Finding) -> str:
    """Why this is no fault, or an empty string."""
    for kind, message, stock, reason in _LISTED:
        if f.kind == kind and re.search(message, f.message) and re.search(stock, f.stock):
            return reason
    return ""
