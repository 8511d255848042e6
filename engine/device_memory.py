"""How much of a GPU's memory is left for KV once a model and the largest step that it will run are there. Measures;
what the step is, others say."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class DeviceMemory:
    """Bytes, after the largest step, with everything given back that it took."""

    total: int
    free: int  # to whoever asks: other processes have taken theirs
    allocated: int  # by us: the weights
    peak: int  # by us, during the step


def kv_nbytes_beside(memory: DeviceMemory, utilization: float, reserved: int) -> int:
    """What is left for KV where this process may take `utilization` of the whole device, and where that is not there to
    be had, of what is free. ValueError where nothing is left; it says of what."""
    allowed = int(memory.total * utilization) - memory.peak
    there = memory.free - (memory.peak - memory.allocated)
    left = min(allowed, there) - reserved
    if left <= 0:
        raise ValueError(
            f"no GPU memory is left for KV: gpu_memory_utilization {utilization} of {memory.total // MIB} MiB, of "
            f"which {memory.free // MIB} are free beside {memory.allocated // MIB} of the model, while a step takes "
            f"{(memory.peak - memory.allocated) // MIB} more and gpu_reserved_bytes is {reserved // MIB} MiB"
        )
    return left


def memory_around(step: Callable[[], object], device: torch.device) -> DeviceMemory:
    """Runs the step twice: first comes what is allocated once and for all."""
    step()
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    step()
    torch.cuda.synchronize(device)
    peak, allocated = torch.cuda.max_memory_allocated(device), torch.cuda.memory_allocated(device)
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    return DeviceMemory(total, free, allocated, peak)
