"""Weight averaging: torch.optim.swa_utils, with averages that are updated in one launch."""

from __future__ import annotations

from torch.optim.swa_utils import PARAM_LIST as PARAM_LIST

from compiled_optim.lr_scheduler import SWALR
from compiled_optim.swa_utils.batch_norm import update_bn
from compiled_optim.swa_utils.functions import (
    get_ema_avg_fn,
    get_ema_multi_avg_fn,
    get_swa_avg_fn,
    get_swa_multi_avg_fn,
)
from compiled_optim.swa_utils.model import AveragedModel

__all__ = [
    "SWALR",
    "AveragedModel",
    "get_ema_avg_fn",
    "get_ema_multi_avg_fn",
    "get_swa_avg_fn",
    "get_swa_multi_avg_fn",
    "update_bn",
]
