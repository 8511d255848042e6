"""Links over gloo: one two-rank process group per link, made without torch's global one. Decides how a dead or closed
end is noticed. Rank 0 receives and hosts the store, rank 1 sends.

Gloo tells of a dead peer only when a wait runs out, and its abort wakes nobody. So each end waits, on a thread, for a
byte that never comes (the canary), which raises as soon as the connection breaks; and an end is closed by letting a
receive of its own time out, which closes the connection and wakes every waiter at both ends."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from functools import partial
from typing import Any, Protocol

import torch
from torch._C._distributed_c10d import PrefixStore, ProcessGroupGloo, Store

from kvtransfer.config import TransferConfig
from kvtransfer.link_store import HostedStore, open_store
from kvtransfer.messages import LinkOffer
from kvtransfer.staging import private_memory
from kvtransfer.transport import LinkFailed, OnFailure

_RECEIVER, _SENDER = 0, 1
_WARM_UP, _CANARY, _CLOSING, _FIRST_OPERATION = 0, 1, 2, 16  # tags
_NUM_OPERATION_TAGS = 1 << 20  # far more than are ever open at once
_FOREVER = timedelta(days=365)


_GlooOptions: Any = ProcessGroupGloo._Options  # type: ignore[attr-defined]  # not in torch's stubs


class _Work(Protocol):
    def wait(self, timeout: timedelta) -> bool: ...


class _Group(Protocol):
    """What is used of ProcessGroupGloo; torch's stubs leave most of it out."""

    def send(self, tensors: list[torch.Tensor], rank: int, tag: int) -> _Work: ...

    def recv(self, tensors: list[torch.Tensor], rank: int, tag: int) -> _Work: ...

    def abort(self) -> None: ...


class GlooLink:
    """Invariant: once `_failure` is set, every call raises LinkFailed. It is set once, and told unless by close."""

    transport = "gloo"

    def __init__(
        self,
        rank: int,
        prefix: str,
        open_store: Callable[[], Store],
        device: ProcessGroupGloo.Device,
        config: TransferConfig,
        on_failure: OnFailure,
    ) -> None:
        self._rank = rank
        self._prefix = prefix
        self._open_store = open_store
        self._device = device
        self._connect_timeout = timedelta(seconds=config.connect_timeout_s)
        self._chunk_timeout = timedelta(seconds=config.chunk_timeout_s)
        self._on_failure = on_failure
        self._lock = threading.Lock()
        self._failure = ""
        self._group: _Group | None = None
        self._canary: threading.Thread | None = None
        self._works: dict[int, tuple[_Work, torch.Tensor]] = {}
        self._next_number = 0

    def connect(self) -> None:
        self._raise_if_failed()
        try:
            group = self._make_group()
            for tag_sender in (_SENDER, _RECEIVER):
                self._exchange_byte(group, is_sending=tag_sender == self._rank)
            canary = self._receive(group, torch.zeros(1, dtype=torch.uint8), _CANARY)
        except RuntimeError as error:
            self.fail(_first_line(error))
            raise LinkFailed(_first_line(error)) from None
        with self._lock:
            if not self._failure:
                self._group = group
                self._canary = threading.Thread(target=self._watch, args=(canary,), name="kv-canary", daemon=True)
                self._canary.start()
                return
        self._poison(group)
        self._raise_if_failed()

    def allocate(self, num_bytes: int) -> torch.Tensor:
        return private_memory(num_bytes)

    def post(self, number: int, staged: torch.Tensor) -> None:
        assert number == self._next_number, "operations of a link have no gaps"
        self._next_number += 1
        self._raise_if_failed()
        group = self._group
        if group is None:
            raise LinkFailed(self._failure)
        tag = _FIRST_OPERATION + number % _NUM_OPERATION_TAGS
        start = self._send if self._rank == _SENDER else self._receive
        try:
            self._works[number] = start(group, staged, tag), staged
        except RuntimeError as error:
            self.fail(_first_line(error))
            raise LinkFailed(_first_line(error)) from None

    def wait(self, number: int) -> torch.Tensor:
        if number not in self._works:
            self._raise_if_failed()
            raise AssertionError(f"operation {number} was not posted")
        work, staged = self._works.pop(number)
        try:
            work.wait(self._chunk_timeout)
        except RuntimeError as error:
            self.fail(_first_line(error))
            raise LinkFailed(_first_line(error)) from None
        return staged

    def release(self, number: int) -> None:
        pass

    def fail(self, reason: str) -> None:
        if self._set_failure(reason):
            self._on_failure(reason)

    def close(self) -> None:
        self._set_failure("closed")
        with self._lock:
            group, self._group = self._group, None
            canary, self._canary = self._canary, None
        if group is not None:
            self._poison(group)
        if canary is not None:
            canary.join(self._chunk_timeout.total_seconds())
        self._works.clear()

    def _set_failure(self, reason: str) -> bool:
        with self._lock:
            is_first = not self._failure
            self._failure = self._failure or reason
            return is_first

    def _raise_if_failed(self) -> None:
        if self._failure:
            raise LinkFailed(self._failure)

    def _make_group(self) -> _Group:
        options = _GlooOptions()
        options._devices = [self._device]
        options._threads = 1
        options._timeout = self._connect_timeout
        group: Any = ProcessGroupGloo(PrefixStore(self._prefix, self._open_store()), self._rank, 2, options)
        made: _Group = group
        return made

    def _send(self, group: _Group, data: torch.Tensor, tag: int) -> _Work:
        return group.send([data], 1 - self._rank, tag)

    def _receive(self, group: _Group, data: torch.Tensor, tag: int) -> _Work:
        return group.recv([data], 1 - self._rank, tag)

    def _exchange_byte(self, group: _Group, *, is_sending: bool) -> None:
        start = self._send if is_sending else self._receive
        start(group, torch.zeros(1, dtype=torch.uint8), _WARM_UP).wait(self._connect_timeout)

    def _watch(self, canary: _Work) -> None:
        try:
            canary.wait(_FOREVER)
            self.fail("the peer broke the link's rules")
        except RuntimeError as error:
            self.fail(_first_line(error))

    def _poison(self, group: _Group) -> None:
        with suppress(RuntimeError):  # meant to: it closes the connection
            self._receive(group, torch.zeros(1, dtype=torch.uint8), _CLOSING).wait(timedelta(milliseconds=1))
        group.abort()


class GlooReceiverLink(GlooLink):
    def __init__(
        self,
        offer: LinkOffer,
        store: Store,
        device: ProcessGroupGloo.Device,
        config: TransferConfig,
        on_failure: OnFailure,
    ) -> None:
        super().__init__(_RECEIVER, offer.prefix, lambda: store, device, config, on_failure)
        self.offer = offer


class GlooTransport:
    """One device (one progress thread) for all links of a process, and one store for all links into it."""

    beacon = ""

    def __init__(self, config: TransferConfig) -> None:
        self._config = config
        self._device = ProcessGroupGloo.create_device(hostname=config.bind_host)
        self._store = HostedStore(config, GlooLink.transport)

    def listen(self, beacon: str, on_failure: OnFailure) -> GlooReceiverLink:
        offer, store = self._store.new_offer()
        return GlooReceiverLink(offer, store, self._device, self._config, on_failure)

    def dial(self, offer: LinkOffer, on_failure: OnFailure) -> GlooLink:
        open_it = partial(open_store, offer, self._config)
        return GlooLink(_SENDER, offer.prefix, open_it, self._device, self._config, on_failure)

    def close(self) -> None:
        self._store.close()


def _first_line(error: RuntimeError) -> str:
    return str(error).partition("\n")[0][:300] or type(error).__name__
