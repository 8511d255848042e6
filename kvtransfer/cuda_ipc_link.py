"""Links between two processes that share one GPU: what is posted lies in GPU memory that both have mapped, and is read
there. Everything else is as over shared memory, which carries the words, tells of a dead peer, and here the handle of
the GPU memory in place of the bytes.

Nothing here has run on a GPU yet (docs/gpu.md)."""

from __future__ import annotations

from typing import Any

import msgpack  # type: ignore[import-untyped]
import torch

from kvtransfer.config import TransferConfig
from kvtransfer.local_socket import Beacon, is_here
from kvtransfer.messages import LinkOffer
from kvtransfer.shared_memory_link import OnUnusable, SharedMemoryReceiver, SharedMemorySender
from kvtransfer.transport import LinkFailed, OnFailure

NAME = "cuda_ipc"
_NOTE_NBYTES = 4096  # of shared memory, for the handle


class CudaIpcSender(SharedMemorySender):
    transport = NAME

    def __init__(
        self,
        offer: LinkOffer,
        device: torch.device,
        config: TransferConfig,
        on_failure: OnFailure,
        on_unusable: OnUnusable,
    ) -> None:
        super().__init__(offer, config, on_failure, on_unusable)
        self._device = device

    def allocate(self, num_bytes: int) -> torch.Tensor:
        self._note = super().allocate(_NOTE_NBYTES)
        # A whole allocation of its own: what the allocator keeps beside it would be shared as well.
        self._memory = torch.empty(num_bytes, dtype=torch.uint8, device=self._device)
        try:
            write_note(self._note, handle_of(self._memory))
        except RuntimeError as error:
            raise LinkFailed(f"GPU memory cannot be shared: {error}") from None
        return self._memory

    def post(self, number: int, staged: torch.Tensor) -> None:
        torch.cuda.current_stream(self._device).synchronize()  # the bytes are there before they are spoken of
        super().post(number, staged)


class CudaIpcReceiver(SharedMemoryReceiver):
    transport = NAME

    def __init__(
        self, device: torch.device, config: TransferConfig, on_failure: OnFailure, on_unusable: OnUnusable
    ) -> None:
        super().__init__(config, on_failure, on_unusable)
        self._device = device

    def release(self, number: int) -> None:
        torch.cuda.current_stream(self._device).synchronize()  # what reads them is over
        super().release(number)

    def _take_in(self, descriptor: int) -> None:
        super()._take_in(descriptor)
        self._note = self._memory
        try:
            self._memory = opened(read_note(self._note), self._device)
        except (RuntimeError, ValueError) as error:
            raise OSError(f"GPU memory cannot be opened: {error}") from None


class CudaIpcTransport:
    """Both workers on one machine and one GPU; ValueError where this system has no way to meet."""

    def __init__(self, config: TransferConfig, device: torch.device) -> None:
        try:
            self._beacon = Beacon()
        except OSError as error:
            raise ValueError(f"transport is {NAME}, and workers cannot meet on this machine: {error}") from error
        self._config = config
        self._device = device
        self.beacon = self._beacon.name

    def listen(self, beacon: str, on_failure: OnFailure) -> CudaIpcReceiver:
        if not beacon or not is_here(beacon):
            raise LinkFailed(f"transport is {NAME}, and the peer is not on this machine, or has another transport")
        try:
            return CudaIpcReceiver(self._device, self._config, on_failure, _never_mind)
        except OSError as error:
            raise LinkFailed(f"nowhere to listen: {error}") from None

    def dial(self, offer: LinkOffer, on_failure: OnFailure) -> CudaIpcSender:
        if offer.transport != NAME:
            raise LinkFailed(f"transport is {NAME}, offered a link over {offer.transport!r}")
        return CudaIpcSender(offer, self._device, self._config, on_failure, _never_mind)

    def close(self) -> None:
        self.beacon = ""
        self._beacon.close()


def handle_of(memory: torch.Tensor) -> list[Any]:
    """What torch shares GPU memory by, and where in the storage the memory begins."""
    storage: Any = memory.untyped_storage()
    return [memory.storage_offset(), memory.numel(), *storage._share_cuda_()]


def opened(handle: list[Any], device: torch.device) -> torch.Tensor:
    """ValueError for what is no handle; RuntimeError where the memory cannot be had."""
    if len(handle) != 10:
        raise ValueError(f"a handle has 10 parts, not {len(handle)}")
    offset, num_bytes, _, *shared = handle
    make: Any = torch.UntypedStorage._new_shared_cuda
    storage = make(device.index or 0, *shared)
    whole = torch.empty(0, dtype=torch.uint8, device=device).set_(storage)
    return whole[offset : offset + num_bytes]


def write_note(memory: torch.Tensor, handle: list[Any]) -> None:
    packed = msgpack.packb(handle)
    framed = len(packed).to_bytes(8, "little") + packed
    assert len(framed) <= memory.numel(), len(framed)
    memory[: len(framed)] = torch.frombuffer(bytearray(framed), dtype=torch.uint8)


def read_note(memory: torch.Tensor) -> list[Any]:
    """ValueError where there is none."""
    raw = bytes(memory.numpy())
    length = int.from_bytes(raw[:8], "little")
    if not 0 < length <= len(raw) - 8:
        raise ValueError(f"a note of {length} bytes in {len(raw)}")
    try:
        handle = msgpack.unpackb(raw[8 : 8 + length])
    except (ValueError, msgpack.UnpackException) as error:
        raise ValueError(f"not a note: {error}") from None
    if not isinstance(handle, list):
        raise ValueError("not a note")
    return handle


def _never_mind(error: OSError) -> None:
    """The link fails and says so; there is no other transport to go over to."""
