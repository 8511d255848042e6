"""Links over NCCL, from GPU memory to GPU memory: one two-rank communicator per link, without torch's global group.
Decides how NCCL is set up so that a dead peer costs one link and not the process. Rank 0 receives and hosts the store,
rank 1 sends. What a deadline means is polled_link.py's.

Nothing here has run on a GPU yet (docs/gpu.md)."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
from torch._C._distributed_c10d import PrefixStore, Store

from kvtransfer.config import TransferConfig
from kvtransfer.link_store import HostedStore, open_store
from kvtransfer.messages import LinkOffer
from kvtransfer.polled_link import PolledLink, PolledReceiverLink
from kvtransfer.transport import LinkFailed, OnFailure

_RECEIVER, _SENDER = 0, 1
NAME = "nccl"

# Of torch's NCCL groups, for the whole process, where nobody has set them otherwise.
_SETTINGS = {
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "0",  # else its watchdog ends the process when a peer is gone
    "TORCH_NCCL_ENABLE_MONITORING": "0",  # else its monitor ends the process when the watchdog hangs in an abort
    "TORCH_NCCL_DUMP_ON_TIMEOUT": "0",
    "TORCH_NCCL_USE_COMM_NONBLOCKING": "1",  # so that an end that waits for nobody can be aborted
    "NCCL_LAUNCH_ORDER_IMPLICIT": "1",  # several links on one GPU: launches keep the order of the host
    "NCCL_MULTI_RANK_GPU_ENABLE": "1",  # NCCL 2.30 and later: both ends on one GPU
}


class NcclWire:
    """Invariant: every operation goes to one stream, in order."""

    def __init__(
        self, rank: int, prefix: str, open_it: Callable[[], Store], device: torch.device, config: TransferConfig
    ) -> None:
        self._rank = rank
        self._prefix = prefix
        self._open_it = open_it
        self._device = device
        self._config = config
        self._stream: Any = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._group: Any = None

    def connect(self) -> None:
        torch.cuda.set_device(self._device)
        self._group = self._make_group()
        self._group.eager_connect_single_device(self._device)
        byte = torch.zeros(1, dtype=torch.uint8, device=self._device)
        for sender in (_SENDER, _RECEIVER):
            self._launch(byte, is_sending=sender == self._rank)
        done = self._event()
        if not _settles(done, self._config.connect_timeout_s):
            raise RuntimeError("nobody at the other end")

    def memory(self, num_bytes: int) -> torch.Tensor:
        made = torch.empty(num_bytes, dtype=torch.uint8, device=self._device)
        # A step under way may still use what the allocator has given away already.
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        return made

    def start(self, data: torch.Tensor) -> Callable[[], bool]:
        if self._group is None:
            raise RuntimeError("not connected")
        # What lies in staging is there, and what lay there has been read: BlockStore waits for both. Only filler comes
        # from the host. So a receive, which is posted beside the engine, never waits for a step.
        on_device = data.to(self._device)
        if on_device is not data:
            self._stream.wait_stream(torch.cuda.current_stream(self._device))
        self._launch(on_device, is_sending=self._rank == _SENDER)
        event = self._event()

        def is_done() -> bool:
            done: bool = event.query()
            return done and on_device is not None  # kept until then

        return is_done

    def abort(self) -> None:
        group, self._group = self._group, None
        if group is not None:
            group.abort()

    def _make_group(self) -> Any:
        from torch._C._distributed_c10d import ProcessGroupNCCL  # not in every build of torch

        options: Any = ProcessGroupNCCL.Options()
        options._timeout = timedelta(seconds=self._config.connect_timeout_s)
        options.config.blocking = 0
        options.config.max_ctas = self._config.nccl_max_ctas
        return ProcessGroupNCCL(PrefixStore(self._prefix, self._open_it()), self._rank, 2, options)

    def _launch(self, data: torch.Tensor, *, is_sending: bool) -> None:
        group = self._group
        with torch.cuda.stream(self._stream):
            work = (group.send if is_sending else group.recv)([data], 1 - self._rank, 0)
            work.wait()  # the stream does, not we

    def _event(self) -> Any:
        event: Any = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(self._stream)
        return event


class NcclTransport:
    """For KV on one GPU; ValueError where torch has no NCCL."""

    beacon = ""

    def __init__(self, config: TransferConfig, device: torch.device) -> None:
        if not torch.distributed.is_nccl_available():
            raise ValueError("transport is nccl, and this build of torch has no NCCL")
        prepare_process(config)
        self._config = config
        self._device = device
        self._store = HostedStore(config, NAME)

    def listen(self, beacon: str, on_failure: OnFailure) -> PolledReceiverLink:
        offer, store = self._store.new_offer()
        wire = NcclWire(_RECEIVER, offer.prefix, lambda: store, self._device, self._config)
        return PolledReceiverLink(offer, wire, self._config, on_failure)

    def dial(self, offer: LinkOffer, on_failure: OnFailure) -> PolledLink:
        if offer.transport != NAME:
            raise LinkFailed(f"transport is {NAME}, offered a link over {offer.transport!r}")
        wire = NcclWire(_SENDER, offer.prefix, lambda: open_store(offer, self._config), self._device, self._config)
        return PolledLink(NAME, wire, self._config, on_failure)

    def close(self) -> None:
        self._store.close()


def prepare_process(config: TransferConfig) -> None:
    """Before the first group is made."""
    os.environ.setdefault("TORCH_NCCL_NONBLOCKING_TIMEOUT", str(max(1, round(config.connect_timeout_s))))
    for name, value in _SETTINGS.items():
        os.environ.setdefault(name, value)


def _settles(event: Any, timeout_s: float) -> bool:
    deadline = time.monotonic() + timeout_s
    while not event.query():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.001)
    return True
