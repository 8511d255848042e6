"""A link over a process group that tells of nothing by itself: operations are polled against a deadline, and a group
that failed or is closed is aborted on a thread, for an abort may hang. Which library moves the bytes is the wire's."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Protocol

import torch

from kvtransfer.config import TransferConfig
from kvtransfer.messages import LinkOffer
from kvtransfer.transport import LinkFailed, OnFailure

_POLL_S = 0.0002
_MAX_ABORT_S = 5.0  # who closes waits no longer; the thread is left behind


class Wire(Protocol):
    """One two-rank process group. All of it raises RuntimeError where the library does."""

    def connect(self) -> None:
        """Meet the other end and prove the wire with a byte each way, within the configured time."""

    def memory(self, num_bytes: int) -> torch.Tensor:
        """[num_bytes], uint8, where the wire can send from and receive into."""

    def start(self, data: torch.Tensor) -> Callable[[], bool]:
        """Begin to send, or to receive into, data; a call that answers whether that is done. Strictly in order."""

    def abort(self) -> None:
        """Give up everything that was begun. May take long, and may never return."""


class PolledLink:
    """Invariant: once `_failure` is set, every call raises LinkFailed; it is set once, and told unless by close. Then
    the wire is aborted, and again where it connected only afterwards."""

    def __init__(self, transport: str, wire: Wire, config: TransferConfig, on_failure: OnFailure) -> None:
        self.transport = transport
        self._wire = wire
        self._chunk_timeout_s = config.chunk_timeout_s
        self._on_failure = on_failure
        self._lock = threading.Lock()
        self._failure = ""
        self._aborting: threading.Thread | None = None
        self._open: dict[int, tuple[Callable[[], bool], torch.Tensor]] = {}
        self._next_number = 0

    def connect(self) -> None:
        self._raise_if_failed()
        try:
            self._wire.connect()
        except RuntimeError as error:
            self._fail_by(error)
        if self._failure:
            self._start_abort()
            raise LinkFailed(self._failure)

    def allocate(self, num_bytes: int) -> torch.Tensor:
        return self._wire.memory(num_bytes)

    def post(self, number: int, staged: torch.Tensor) -> None:
        assert number == self._next_number, "operations of a link have no gaps"
        self._next_number += 1
        self._raise_if_failed()
        try:
            self._open[number] = self._wire.start(staged), staged
        except RuntimeError as error:
            self._fail_by(error)

    def wait(self, number: int) -> torch.Tensor:
        if number not in self._open:
            self._raise_if_failed()
            raise AssertionError(f"operation {number} was not posted")
        is_done, staged = self._open.pop(number)
        deadline = time.monotonic() + self._chunk_timeout_s
        try:
            while not is_done():
                self._raise_if_failed()
                if time.monotonic() > deadline:
                    self.fail(f"operation {number} missed its deadline")
                    raise LinkFailed(self._failure)
                time.sleep(_POLL_S)
        except RuntimeError as error:
            self._fail_by(error)
        self._raise_if_failed()  # what is done because it was aborted is not done
        return staged

    def release(self, number: int) -> None:
        pass

    def fail(self, reason: str) -> None:
        if self._end(reason):
            self._on_failure(reason)

    def close(self) -> None:
        self._end("closed")
        if self._aborting is not None:
            self._aborting.join(_MAX_ABORT_S)

    def _end(self, reason: str) -> bool:
        """Whether it was the first to say so."""
        with self._lock:
            if self._failure:
                return False
            self._failure = reason
            self._start_abort()
            return True

    def _start_abort(self) -> None:
        self._aborting = threading.Thread(target=self._abort, name="kv-abort", daemon=True)
        self._aborting.start()

    def _abort(self) -> None:
        try:
            self._wire.abort()
        except RuntimeError:  # it was gone already
            return

    def _fail_by(self, error: RuntimeError) -> None:
        self.fail(str(error).partition("\n")[0][:300] or type(error).__name__)
        raise LinkFailed(self._failure) from None

    def _raise_if_failed(self) -> None:
        if self._failure:
            raise LinkFailed(self._failure)


class PolledReceiverLink(PolledLink):
    def __init__(self, offer: LinkOffer, wire: Wire, config: TransferConfig, on_failure: OnFailure) -> None:
        super().__init__(offer.transport, wire, config, on_failure)
        self.offer = offer
