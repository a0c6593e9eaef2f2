"""What Inductor and Triton ask of a GPU, answered on a machine that has none.

For records, for ``inspect`` and for tests. A process that trains never imports it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import torch


@contextmanager
def pretend(capability: int) -> Iterator[None]:
    """Within it, ``torch.cuda`` and Triton's driver describe one GPU of this compute capability, such as 90."""
    from torch._dynamo import device_interface
    from torch.utils._triton import has_triton
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    major, minor = divmod(capability, 10)
    properties = SimpleNamespace(
        name=f"sm_{capability}",
        major=major,
        minor=minor,
        multi_processor_count=132,
        total_memory=80 << 30,
        warp_size=32,
        regs_per_multiprocessor=65536,
        max_threads_per_multi_processor=2048,
        max_threads_per_block=1024,
        shared_memory_per_block=49152,
        shared_memory_per_block_optin=232448,
        L2_cache_size=50 << 20,
    )
    answers = {
        "is_available": True,
        "device_count": 1,
        "current_device": 0,
        "synchronize": None,
        "get_device_properties": properties,
        "get_compute_capability": capability,
        "is_triton_capable": True,
        "raise_if_triton_unavailable": None,
        "set_device": None,
    }

    def always(value: Any) -> Any:
        return staticmethod(lambda *args, **kwargs: value)

    attributes = {name: always(value) for name, value in answers.items()}
    interface = type(
        "Absent", (device_interface.CudaInterface,), {**attributes, "Worker": type("Worker", (), attributes)}
    )
    device_interface.init_device_reg()
    registered = dict(device_interface.device_interfaces)
    stand_ins: dict[str, Any] = {
        "get_device_properties": lambda *args: properties,
        "get_device_capability": lambda *args: (major, minor),
        "current_device": lambda: 0,
        "set_device": lambda device: None,
        "_DeviceGuard": lambda device: nullcontext(),
    }
    before = {name: getattr(torch.cuda, name) for name in stand_ins}
    target = GPUTarget("cuda", capability, 32)
    active = driver._active
    try:
        for name in ("cuda", "cuda:0"):
            device_interface.register_interface_for_device(name, interface)
        vars(torch.cuda).update(stand_ins)
        driver.set_active(SimpleNamespace(get_current_target=lambda: target, get_current_device=lambda: 0))
        has_triton.cache_clear()  # Inductor asks it for every device, and it keeps the first answer
        yield
    finally:
        driver._active = active
        vars(torch.cuda).update(before)
        device_interface.device_interfaces.clear()
        device_interface.device_interfaces.update(registered)
        has_triton.cache_clear()
