"""The card that a run of bench/gpu.py is on: what it is, how it is timed, how fast it copies and multiplies. Everything
here also works on a CPU, so that tests can run the sections at sizes that mean nothing."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class Card:
    device: torch.device

    @property
    def is_gpu(self) -> bool:
        return self.device.type == "cuda"

    def seconds_of(self, fn: Callable[[], object]) -> float:
        """Of one call, between two events on the device: what the host does counts where the device waits for it."""
        if not self.is_gpu:
            started_at = time.perf_counter()
            fn()
            return time.perf_counter() - started_at
        make_event: Any = torch.cuda.Event  # untyped
        begin, end = make_event(enable_timing=True), make_event(enable_timing=True)
        torch.cuda.synchronize(self.device)
        begin.record()
        fn()
        end.record()
        torch.cuda.synchronize(self.device)
        milliseconds: float = begin.elapsed_time(end)
        return milliseconds / 1e3

    def median_s(self, fn: Callable[[], object], runs: int, warm_up: int = 2) -> float:
        for _ in range(warm_up):
            fn()
        return statistics.median(self.seconds_of(fn) for _ in range(runs))

    def give_back(self) -> None:
        """Between sections: what is not referred to any more, cycles included, goes back to the card."""
        gc.collect()
        if self.is_gpu:
            torch.cuda.synchronize(self.device)
            torch.cuda.empty_cache()

    def free_nbytes(self) -> int:
        return torch.cuda.mem_get_info(self.device)[0] if self.is_gpu else 4 * GIB


def software() -> dict[str, str]:
    """Versions, each under its name; what is not there is said to be missing."""
    found = {"torch": torch.__version__, "cuda": str(torch.version.cuda)}
    try:
        found["nccl"] = ".".join(map(str, nccl_version()))
    except (AttributeError, ImportError) as error:
        found["nccl"] = f"none ({error})"
    try:
        import triton

        found["triton"] = triton.__version__
    except ImportError:
        found["triton"] = "none"
    if torch.cuda.is_available():
        facts = torch.cuda.get_device_properties(0)
        found["card"] = f"{facts.name}, {facts.total_memory / GIB:.1f} GiB, {facts.multi_processor_count} SMs"
        found["cards"] = str(torch.cuda.device_count())
        found["driver"] = driver_version()
    return found


def nccl_version() -> tuple[int, ...]:
    """Of the library that is loaded; torch.cuda.nccl names the one that torch was built with."""
    from torch._C._distributed_c10d import ProcessGroupNCCL  # not in every build of torch

    version: tuple[int, ...] = ProcessGroupNCCL.get_runtime_nccl_version()  # type: ignore[call-arg]  # it is static
    return version


def driver_version() -> str:
    """As the kernel module tells it: no tool is asked."""
    try:
        with open("/proc/driver/nvidia/version") as text:
            return text.readline().strip()
    except OSError as error:
        return f"unknown ({error.strerror})"


def copy_nbytes_per_s(card: Card, num_bytes: int, runs: int) -> float:
    """Of a copy on the device, bytes read plus bytes written."""
    source = torch.empty(num_bytes, dtype=torch.uint8, device=card.device).random_(0, 256)
    target = torch.empty_like(source)
    return 2 * num_bytes / card.median_s(lambda: target.copy_(source), runs)


def read_nbytes_per_s(card: Card, num_bytes: int, runs: int) -> float:
    """Of a pass that only reads: one matrix-vector product, as decoding one request is many of."""
    columns = 4096
    matrix = torch.randn(num_bytes // 2 // columns, columns, device=card.device, dtype=torch.bfloat16)
    vector = torch.randn(columns, 1, device=card.device, dtype=torch.bfloat16)
    return matrix.nbytes / card.median_s(lambda: matrix @ vector, runs)


def flops_per_s(card: Card, size: int, runs: int) -> float:
    """Of a large product in bfloat16, of random numbers: zeros would be faster."""
    left, right = (torch.randn(size, size, device=card.device, dtype=torch.bfloat16) for _ in range(2))
    return 2 * size**3 / card.median_s(lambda: left @ right, runs)
