"""A wire for polled links over gloo on the CPU, so that what a GPU's links do about deadlines, aborts and dead peers is
driven by real process groups. Unlike gloo's own links it has no canary: nothing tells of a dead peer but a deadline."""

from __future__ import annotations

import threading
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
from torch._C._distributed_c10d import PrefixStore, ProcessGroupGloo, Store

from kvtransfer.config import TransferConfig
from kvtransfer.link_store import HostedStore, open_store
from kvtransfer.messages import LinkOffer
from kvtransfer.polled_link import PolledLink, PolledReceiverLink
from kvtransfer.transport import OnFailure

_FOREVER = timedelta(days=1)


class GlooWire:
    def __init__(self, rank: int, prefix: str, open_it: Callable[[], Store], config: TransferConfig) -> None:
        self._rank, self._prefix, self._open_it, self._config = rank, prefix, open_it, config
        self._tag = 1
        self.group: Any = None
        self.num_aborts = 0

    def connect(self) -> None:
        options: Any = ProcessGroupGloo._Options()  # type: ignore[attr-defined]
        options._devices = [ProcessGroupGloo.create_device(hostname="127.0.0.1")]
        options._threads = 1
        options._timeout = timedelta(seconds=self._config.connect_timeout_s)
        group: Any = ProcessGroupGloo(PrefixStore(self._prefix, self._open_it()), self._rank, 2, options)
        byte = torch.zeros(1, dtype=torch.uint8)
        for sender in (1, 0):
            start = group.send if sender == self._rank else group.recv
            start([byte], 1 - self._rank, 0).wait(timedelta(seconds=self._config.connect_timeout_s))
        self.group = group

    def memory(self, num_bytes: int) -> torch.Tensor:
        return torch.empty(num_bytes, dtype=torch.uint8)

    def start(self, data: torch.Tensor) -> Callable[[], bool]:
        if self.group is None:
            raise RuntimeError("not connected")
        begin = self.group.send if self._rank == 1 else self.group.recv
        work, ended = begin([data], 1 - self._rank, self._tag), list[str]()
        self._tag += 1

        def wait() -> None:
            try:
                work.wait(_FOREVER)
                ended.append("")
            except RuntimeError as error:
                ended.append(str(error))

        threading.Thread(target=wait, name="gloo-wire", daemon=True).start()

        def is_done() -> bool:
            if ended and ended[0]:
                raise RuntimeError(ended[0])
            return bool(ended)

        return is_done

    def abort(self) -> None:
        self.num_aborts += 1
        group, self.group = self.group, None
        if group is None:
            return
        try:  # meant to time out: it closes the connection
            group.recv([torch.zeros(1, dtype=torch.uint8)], 1 - self._rank, 1 << 20).wait(timedelta(milliseconds=1))
        except RuntimeError:
            group.abort()


class GlooWireTransport:
    beacon = ""

    def __init__(self, config: TransferConfig) -> None:
        self._config = config
        self._store = HostedStore(config, "polled")
        self.wires: list[GlooWire] = []

    def listen(self, beacon: str, on_failure: OnFailure) -> PolledReceiverLink:
        offer, store = self._store.new_offer()
        return PolledReceiverLink(offer, self._wire(0, offer, lambda: store), self._config, on_failure)

    def dial(self, offer: LinkOffer, on_failure: OnFailure) -> PolledLink:
        wire = self._wire(1, offer, lambda: open_store(offer, self._config))
        return PolledLink("polled", wire, self._config, on_failure)

    def close(self) -> None:
        self._store.close()

    def _wire(self, rank: int, offer: LinkOffer, open_it: Callable[[], Store]) -> GlooWire:
        self.wires.append(GlooWire(rank, offer.prefix, open_it, self._config))
        return self.wires[-1]
