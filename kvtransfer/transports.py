"""Which transport carries a link: shared memory where both workers are on one machine and want it, else gloo; from GPU
to GPU only where the configuration says so. Knows none of them from inside."""

from __future__ import annotations

import logging

import torch

from kvtransfer.config import TransferConfig
from kvtransfer.cuda_ipc_link import CudaIpcTransport
from kvtransfer.gloo_link import GlooTransport
from kvtransfer.local_socket import is_here
from kvtransfer.messages import LinkOffer
from kvtransfer.nccl_link import NcclTransport
from kvtransfer.shared_memory_link import SharedMemoryTransport
from kvtransfer.transport import LinkFailed, OnFailure, ReceiverLink, SenderLink, Transport

logger = logging.getLogger("twinring.kvtransfer")


def transport_for(config: TransferConfig, device: torch.device) -> Transport:
    """device: where the KV is. ValueError where the configured transport needs another one."""
    if config.transport not in ("nccl", "cuda_ipc"):
        return LocalFirst(config)
    if device.type != "cuda":
        raise ValueError(f"transport {config.transport} moves KV between GPUs, and it is on {device}")
    return NcclTransport(config, device) if config.transport == "nccl" else CudaIpcTransport(config, device)


class LocalFirst:
    """The dialling worker says where it is, the dialled one chooses: each of them can rule shared memory out, by its
    setting or because it has none."""

    def __init__(self, config: TransferConfig) -> None:
        self._needs_shared_memory = config.transport == "shared_memory"
        self._gloo = GlooTransport(config)
        self._shared_memory = None if config.transport == "gloo" else _shared_memory(config)

    @property
    def beacon(self) -> str:
        return self._shared_memory.beacon if self._shared_memory is not None else ""

    def listen(self, beacon: str, on_failure: OnFailure) -> ReceiverLink:
        if self._shared_memory is not None and self._shared_memory.beacon and beacon and is_here(beacon):
            return self._shared_memory.listen(beacon, on_failure)
        if self._needs_shared_memory:
            raise LinkFailed("transport is shared_memory, and there is none with this worker")
        return self._gloo.listen(beacon, on_failure)

    def dial(self, offer: LinkOffer, on_failure: OnFailure) -> SenderLink:
        if offer.transport == "shared_memory" and self._shared_memory is not None:
            return self._shared_memory.dial(offer, on_failure)
        if offer.transport != "gloo" or self._needs_shared_memory:
            raise LinkFailed(f"offered a link over {offer.transport!r}")
        return self._gloo.dial(offer, on_failure)

    def close(self) -> None:
        self._gloo.close()
        if self._shared_memory is not None:
            self._shared_memory.close()


def _shared_memory(config: TransferConfig) -> SharedMemoryTransport | None:
    try:
        return SharedMemoryTransport(config)
    except OSError as error:
        logger.warning("no shared memory for KV links: %s", error)
        return None
