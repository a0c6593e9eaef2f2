"""``Optimizer.step_in_backward``: updates during the backward pass, so that few gradients exist at a time."""

from __future__ import annotations

import weakref
from typing import Any, Literal

from torch.nn import Module
from torch.nn.parallel import DistributedDataParallel

from compiled_optim._engine.executions.blocks import Blocks
from compiled_optim._engine.executions.work import Work


class BackwardHandle:
    """What `step_in_backward` returns: undoes it by ``remove()``, or at the end of a ``with`` block."""

    def __init__(self, optimizer: Any) -> None:
        self._optimizer, self._blocks = weakref.ref(optimizer), weakref.ref(optimizer._execution)

    def remove(self) -> None:
        """From now on ``step()`` updates all parameters again. Gradients that are there stay."""
        optimizer, blocks = self._optimizer(), self._blocks()
        if optimizer is not None and blocks is not None and optimizer._execution is blocks:
            blocks.remove_hooks()
            optimizer._execution = None  # and the next step makes another

    def __enter__(self) -> BackwardHandle:
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()


class StepsInBackward:
    """The part of `Optimizer` that updates parameters during the backward pass."""

    def step_in_backward(
        self,
        model: Module | None = None,
        *,
        micro_steps: int = 1,
        block_elements: int = 1 << 20,
        norm: Literal["previous"] | None = None,
    ) -> BackwardHandle:
        """From now on ``loss.backward()`` updates parameters as soon as their gradients are there, and frees those.

        The loop stays as it is: ``loss.backward(); optimizer.step(); optimizer.zero_grad()``. Parameters and state
        become what they would become without this, but only about ``2 * block_elements`` elements of gradients exist
        at a time, instead of all. After ``backward()`` the gradients are None. ``step()`` updates what still has a
        gradient, such as parameters outside of ``model``, advances an attached schedule, and begins the next iteration.

        - Learning rates must be set before ``backward()``, and whatever changes gradients between ``backward()`` and
          ``step()`` comes too late, hooks of ``step()`` included. `Tensor.register_hook` changes them in time, and so
          do those `Tensor.register_post_accumulate_grad_hook` that were registered before this call.
        - A backward pass that raises has updated some parameters. Call ``zero_grad()`` or ``step()`` of the optimizer
          before the next one.
        - A second ``backward()`` of one graph, after ``retain_graph=True``, raises autograd's error about a modified
          tensor, unless the first was not the last of the ``micro_steps``. A reentrant checkpoint has a backward pass
          for each segment, so no parameter must be used in several segments.
        - A ``torch.compile``d model has all gradients at once when its backward graph ends: they are freed block by
          block, but the peak is that of an ordinary step.
        - Parameters that are added, replaced or unfrozen later are followed. A copy of the optimizer, or one that was
          loaded, steps in the ordinary way. The parameters do not keep the optimizer alive.

        The idea is that of LOMO, `Full Parameter Fine-tuning for Large Language Models with Limited Resources
        <https://arxiv.org/abs/2306.09782>`_, and of `Tensor.register_post_accumulate_grad_hook`.

        Args:
            model: only its parameters are updated during the backward pass; None for all of the optimizer.
            micro_steps: how many times a gradient is accumulated, in as many backward passes, before its parameter is
                updated. ``step()`` updates those that were accumulated less often.
            block_elements: parameters are gathered into blocks of at least so many elements, because to launch a kernel
                for a small one takes longer than to update it. With 1 each parameter is updated alone.
            norm: by which ``max_grad_norm`` clips. Not all gradients are there when the first is used, so the norm of
                this iteration is not known: "previous" takes the last finite norm of an iteration, and in the first
                iteration that of the gradients used so far. ``grad_norm`` is of all gradients, after ``step()``.

        Returns:
            A handle to undo it.

        Raises:
            TypeError: if ``model`` is no module, or has a DistributedDataParallel in it, which reduces gradients after
                they were accumulated. FSDP2 and tensor parallel work.
            ValueError: if it was called before; for numbers below 1; for ``differentiable=True``; if the optimizer has
                no parameter of the model; for ``skip_nonfinite=True``; for ``max_grad_norm`` without ``norm``, and the
                reverse.
            RuntimeError: during ``backward()``, if a gradient is accumulated more than ``micro_steps`` times before
                ``step()``; during ``step()``, for a GradScaler, whose verdict comes too late, and for a gradient that
                was set after the update.

        Example:
            >>> import torch
            >>> from compiled_optim import SGD
            >>> model = torch.nn.Linear(2, 1)
            >>> optimizer = SGD(model.parameters(), lr=0.1)
            >>> handle = optimizer.step_in_backward(model)
            >>> model(torch.ones(1, 2)).sum().backward()
            >>> model.weight.grad is None
            True
            >>> optimizer.step()
            >>> handle.remove()
        """
        optimizer: Any = self
        if not optimizer.rule.declaration.options:
            raise TypeError(f"step_in_backward needs an optimizer that declares a rule, got a {type(self).__name__}")
        for name, value in (("micro_steps", micro_steps), ("block_elements", block_elements)):
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be an int of at least 1, got {value!r}")
        if isinstance(optimizer._execution, Blocks):
            raise ValueError("step_in_backward was called before: remove() its handle first")
        if optimizer.defaults.get("differentiable"):
            raise ValueError("step_in_backward does not support differentiable=True: it frees the gradients")
        if norm not in (None, "previous"):
            raise ValueError(f"norm must be 'previous' or None, got {norm!r}")
        if norm is not None and optimizer.max_grad_norm is None:
            raise ValueError(f"norm={norm!r} needs an optimizer that clips, got max_grad_norm=None")
        if model is not None:
            _check_model(optimizer, model)
        reference = weakref.ref(optimizer)

        def begin() -> Work | None:
            owner = reference()
            if owner is None:
                return None
            if owner._averages_are_in:
                raise RuntimeError("backward() must not update parameters within averaged(), where they are averages")
            owner._check_schedule()
            work = owner._work()
            owner._execution.surround(work, owner._one_pass, None)
            return work  # type: ignore[no-any-return]

        def chosen() -> set[int] | None:
            return None if model is None else {*map(id, model.parameters())}

        blocks = Blocks(
            optimizer.rule, optimizer._compiled, begin, chosen, micro_steps, block_elements, norm is not None
        )
        blocks.surround(
            blocks.work_on(optimizer.param_groups, optimizer.state, optimizer.defaults), optimizer._one_pass, None
        )
        optimizer._execution = blocks
        blocks.follow(optimizer._work())
        return BackwardHandle(optimizer)


def _check_model(optimizer: Any, model: Any) -> None:
    if not isinstance(model, Module):
        raise TypeError(f"model must be a torch.nn.Module or None, got a {type(model).__name__}")
    if any(isinstance(module, DistributedDataParallel) for module in model.modules()):
        raise TypeError("model must not be a DistributedDataParallel, which reduces gradients after they are used here")
    params = {*map(id, model.parameters())}
    if not any(id(p) in params for group in optimizer.param_groups for p in group["params"]):
        raise ValueError("model must have parameters of the optimizer, got one that has none of them")
