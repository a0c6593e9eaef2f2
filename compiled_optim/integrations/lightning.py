"""Callbacks of Lightning whose averages are updated in one launch."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import callbacks

from compiled_optim.swa_utils import AveragedModel, get_ema_avg_fn

__all__ = ["EMAWeightAveraging", "WeightAveraging"]


class WeightAveraging(callbacks.WeightAveraging):  # type: ignore[misc]
    """Lightning's callback of this name, with `compiled_optim.swa_utils.AveragedModel` as its average.

    Checkpoints are the same, so either callback resumes what the other saved.

    Args:
        compiled: False averages as torch does.
        kwargs: Lightning's arguments, and those of the average such as ``avg_fn``.

    Example:
        >>> callback = WeightAveraging(avg_fn=get_ema_avg_fn(0.99))  # doctest: +SKIP
        >>> Trainer(callbacks=[callback]).fit(model, data)  # doctest: +SKIP
    """

    _average_model: Any

    def __init__(self, *args: Any, compiled: bool = True, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._compiled = compiled

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Creates the average when fit begins."""
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            device = self._average_model.n_averaged.device
            self._average_model = None  # Lightning's goes before ours is made: two copies may not fit
            self._average_model = AveragedModel(
                pl_module, device, use_buffers=self._use_buffers, compiled=self._compiled, **self._kwargs
            )


class EMAWeightAveraging(callbacks.EMAWeightAveraging, WeightAveraging):  # type: ignore[misc]
    """Lightning's callback of this name: the exponential average of `WeightAveraging`, and when it is updated.

    Args:
        decay: of the average per update, in [0, 1].
        kwargs: Lightning's arguments, such as ``update_every_n_steps``, and ``compiled``.
    """

    def __init__(self, *args: Any, decay: float = 0.999, **kwargs: Any) -> None:
        super().__init__(*args, decay=decay, **kwargs)
        self._kwargs["avg_fn"] = get_ema_avg_fn(decay)  # whose weight is known without a call
