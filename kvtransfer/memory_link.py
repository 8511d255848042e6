"""Links within one process, for tests: the same rules as any link, and faults on demand."""

from __future__ import annotations

import secrets
import threading
from dataclasses import dataclass, field

import torch

from kvtransfer.config import TransferConfig
from kvtransfer.messages import LinkOffer
from kvtransfer.staging import private_memory
from kvtransfer.transport import LinkFailed, OnFailure


@dataclass(eq=False)
class MemoryWire:
    """What two ends share; all under `changed`. Setting is_stalled is the fault: bytes stop, nobody is told."""

    changed: threading.Condition = field(default_factory=threading.Condition)
    num_connected: int = 0
    is_stalled: bool = False
    failure: str = ""
    sent: dict[int, torch.Tensor] = field(default_factory=dict)
    posted: dict[int, torch.Tensor] = field(default_factory=dict)
    num_done: int = 0  # operations [0, num_done) are complete

    def move(self) -> None:
        while not self.is_stalled and not self.failure and self.num_done in self.sent and self.num_done in self.posted:
            sent, posted = self.sent.pop(self.num_done), self.posted.pop(self.num_done)
            if sent.numel() != posted.numel():
                self.failure = f"{sent.numel()} bytes sent for {posted.numel()} posted"
            else:
                posted.copy_(sent)
                self.num_done += 1
        self.changed.notify_all()

    def stall(self, is_stalled: bool = True) -> None:
        with self.changed:
            self.is_stalled = is_stalled
            self.move()

    def cut(self, reason: str = "cut") -> None:
        """As when the process at the other end is killed."""
        with self.changed:
            self.failure = self.failure or reason
            self.changed.notify_all()


class MemoryLink:
    transport = "memory"

    def __init__(self, wire: MemoryWire, is_sender: bool, config: TransferConfig, on_failure: OnFailure) -> None:
        self._wire = wire
        self._mine = wire.sent if is_sender else wire.posted
        self._config = config
        self._on_failure = on_failure
        self._next_number = 0
        self._open: dict[int, torch.Tensor] = {}  # posted and not awaited
        self._lock = threading.Lock()
        self._is_settled = False  # failed and told so, or closed
        self._canary: threading.Thread | None = None

    def connect(self) -> None:
        wire = self._wire
        with wire.changed:
            wire.num_connected += 1
            wire.changed.notify_all()
            met = wire.changed.wait_for(lambda: wire.num_connected == 2 or wire.failure, self._config.connect_timeout_s)
        if not met:
            self.fail("nobody at the other end")
        self._raise_if_failed()
        self._canary = threading.Thread(target=self._watch, name="kv-canary", daemon=True)
        self._canary.start()

    def allocate(self, num_bytes: int) -> torch.Tensor:
        return private_memory(num_bytes)

    def post(self, number: int, staged: torch.Tensor) -> None:
        assert number == self._next_number, "operations of a link have no gaps"
        self._next_number += 1
        with self._wire.changed:
            self._raise_if_failed()
            self._mine[number] = self._open[number] = staged
            self._wire.move()

    def wait(self, number: int) -> torch.Tensor:
        wire = self._wire
        with wire.changed:
            timeout_s = self._config.chunk_timeout_s
            done = wire.changed.wait_for(lambda: wire.num_done > number or wire.failure, timeout_s)
            is_done = wire.num_done > number
        if not done:
            self.fail(f"operation {number} missed its deadline")
        if not is_done:
            self._raise_if_failed()
        return self._open.pop(number)

    def release(self, number: int) -> None:
        pass

    def fail(self, reason: str) -> None:
        self._wire.cut(reason)
        if self._settle():
            self._on_failure(reason)

    def close(self) -> None:
        self._settle()
        self._wire.cut("closed")
        if self._canary is not None:
            self._canary.join()

    def _settle(self) -> bool:
        with self._lock:
            is_first, self._is_settled = not self._is_settled, True
            return is_first

    def _raise_if_failed(self) -> None:
        if self._wire.failure:
            raise LinkFailed(self._wire.failure)

    def _watch(self) -> None:
        with self._wire.changed:
            self._wire.changed.wait_for(lambda: bool(self._wire.failure))
        if self._settle():
            self._on_failure(self._wire.failure)


class MemoryReceiverLink(MemoryLink):
    def __init__(self, offer: LinkOffer, wire: MemoryWire, config: TransferConfig, on_failure: OnFailure) -> None:
        super().__init__(wire, False, config, on_failure)
        self.offer = offer


class MemoryTransport:
    """Shared by the agents of one process: links find each other by prefix. `wires` is the tests' handle for faults."""

    def __init__(self, config: TransferConfig) -> None:
        self._config = config
        self.wires: dict[str, MemoryWire] = {}

    beacon = ""

    def listen(self, beacon: str, on_failure: OnFailure) -> MemoryReceiverLink:
        offer = LinkOffer("memory", 0, secrets.token_hex(16), "memory")
        wire = self.wires[offer.prefix] = MemoryWire()
        return MemoryReceiverLink(offer, wire, self._config, on_failure)

    def dial(self, offer: LinkOffer, on_failure: OnFailure) -> MemoryLink:
        return MemoryLink(self.wires[offer.prefix], True, self._config, on_failure)

    def close(self) -> None:
        pass
