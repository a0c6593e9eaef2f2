"""The docstring of an optimizer class, made from its declaration when somebody reads it."""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Iterator
from typing import Any

from compiled_optim._engine.declaration import Declaration
from compiled_optim.declare import Carried, Number

# Arguments that mean the same in every class: the library acts on them, and no rule reads them.
SHARED = {
    "params": "parameters, named parameters, or dicts that define param groups, as in torch.optim",
    "maximize": "ascend instead of descend",
    "foreach": "False updates one tensor at a time in eager steps; otherwise lists of tensors are updated",
    "differentiable": "record the step with autograd; excludes compiled",
    "capturable": "keep step counts on the device of the parameters, so that a CUDA graph can capture the step",
    "fused": "True is compiled=True under torch.optim's name; keeps step counts on the device of the parameters, and "
    "lets torch.amp.GradScaler unscale within the step",
    "compiled": "False steps eagerly. True takes the best execution for the device of the parameters. "
    '"multi_tensor" is one launch of a native kernel for all tensors of a device and a dtype, '
    "the choice of True on the CPU and on CUDA. "
    '"foreach" is a graph over lists of tensors from torch.compile. '
    "What cannot be compiled steps eagerly, with a CompileFallbackWarning",
    "max_grad_norm": "clip the norm of all gradients to this, as torch.nn.utils.clip_grad_norm_ does, in the launch of "
    "the update. Gradients are not written. ``grad_norm`` is the norm of the last step",
    "norm_type": "2 or inf, the norm that is clipped",
    "error_if_nonfinite": "raise RuntimeError, and update nothing, if the norm is not finite",
    "skip_nonfinite": "leave out a step in which a gradient is not finite, and count it in ``skipped_steps``; where "
    "step counts lie on a GPU, the host waits for nothing, otherwise for the norm",
    "ema_decay": "keep an average of each parameter, ``ema += (1 - ema_decay) * (parameter - ema)``, as the state "
    '"ema"; a function is called with the step, 1 at first. The first average is the parameter. See ``averaged()``',
    "state_dtype": "torch.float32 or torch.bfloat16, the dtype of the moments of real parameters; by default that of "
    "the parameter, or float32 beside a master",
    "master_weights": 'keep float32 masters of bfloat16 and float16 parameters as the state "master"; the parameter is '
    "the rounded master",
    "stochastic_rounding": "round bfloat16 parameters up or down at random, in the mean to what they would be; an int "
    "is the seed, True is 1",
}


class Documentation:
    """The ``__doc__`` of a class: the text it was written with, and sections that say what its fields say."""

    def __init__(self, declaration: Declaration, text: str | None) -> None:
        self._declaration, self._text = declaration, text or f"{declaration.name}."

    def __get__(self, instance: Any, owner: Any) -> str:
        text = inspect.cleandoc(self._text)
        sections = {
            "Args": _arguments(self._declaration),
            "State": _state(self._declaration),
            "Example": _example(owner),
        }
        for title, lines in sections.items():
            body = "\n".join(map(_indent, lines))
            if body and f"{title}:" not in text:
                text += f"\n\n{title}:\n{body}"
        return text + "\n"


def _indent(line: str) -> str:
    if line.startswith(">>>"):
        return f"    {line}"
    return textwrap.fill(
        line, 100, initial_indent=" " * 4, subsequent_indent=" " * 8, break_on_hyphens=False, break_long_words=False
    )


def _arguments(declaration: Declaration) -> Iterator[str]:
    yield f"params: {SHARED['params']}."
    for name, parameter in [*declaration.signature().parameters.items()][2:]:
        field = declaration.options.get(name)
        annotation = parameter.annotation
        kind = annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)
        label = name if annotation is parameter.empty else f"{name} ({kind})"
        what = [(field.help if field else "") or SHARED.get(name, "")]
        if isinstance(field, Number):
            each = "each " if isinstance(field.default, tuple) else ""
            what += [
                f"unit: {field.unit}" if field.unit else "",
                f"{each}{field.range}" if field.range != "a number" else "",
            ]
        what += [f"default: {parameter.default!r}"]
        yield f"{label}: {'; '.join(filter(None, what))}."


def _state(declaration: Declaration) -> Iterator[str]:
    if declaration.counts:
        yield "step: number of steps taken, 0-d."
    for name, field in {**declaration.carried, **declaration.buffers}.items():
        what = [
            field.help,
            "0-d" if isinstance(field, Carried) else "",
            _condition(field.when) if field.when else "",
        ]
        yield f"{name}: {', '.join(filter(None, what)) or 'shaped like its parameter'}."


def _condition(when: str) -> str:
    switch = when.removeprefix("not ")
    return f"kept while {switch} is {'on' if switch == when else 'off'}"


def _example(cls: Any) -> Iterator[str]:
    module = "compiled_optim" if cls.__module__.startswith("compiled_optim.") else cls.__module__
    model, batch = "torch.nn.Linear(3, 1)", "torch.ones(2, 3)"
    if not cls.accepts_dense:
        model, batch = "torch.nn.Embedding(10, 3, sparse=True)", "torch.tensor([1, 4])"
    if cls.matrices_only:
        model = "torch.nn.Linear(3, 1, bias=False)"
    lr = cls.rule.declaration.options.get("lr")
    yield ">>> import torch"
    yield f">>> from {module} import {cls.__name__}"
    yield f">>> model = {model}"
    yield f">>> optimizer = {cls.__name__}(model.parameters(), {f'lr={lr.default}, ' if lr else ''}compiled=True)"
    yield f">>> model({batch}).sum().backward()"
    yield ">>> optimizer.step()"
