"""Links between two processes of one machine: what is posted lies in memory that both have, and the receiver reads it
there, so that nothing is copied on the way. Decides when the sender may write there again: once the receiver has said
that it has read it. A socket between the two carries those words, and its end tells each that the other is gone; who
waits for a word also looks at the other's mark in the shared memory, which tells of a killed one sooner.
The receiver waits for the sender, as over gloo."""

from __future__ import annotations

import logging
import os
import select
import socket
import struct
import threading
import time
from collections.abc import Callable
from contextlib import suppress

import torch

from kvtransfer.config import TransferConfig
from kvtransfer.life_mark import MARK_NBYTES, is_marked, marking
from kvtransfer.local_socket import Beacon, MeetingPoint, go_to
from kvtransfer.messages import LinkOffer
from kvtransfer.segment import make_segment, map_segment, receive_segment, send_segment
from kvtransfer.staging import private_memory
from kvtransfer.transport import LinkFailed, OnFailure

logger = logging.getLogger("twinring.kvtransfer")

_WORD = struct.Struct("<QQQ")  # operation, offset, bytes; the same word back: read
_NOWHERE = (1 << 64) - 1  # the offset of filler
_ALIGNMENT = 8  # of an offset: that of every dtype, and of a checksum's words
_LOOK_S = 0.02  # at the other's mark

OnUnusable = Callable[[OSError], None]


class SharedMemoryLink:
    """Invariant: once `_failure` is set, every call raises LinkFailed; it is set once, and told unless by close.
    Words that came and that nobody has waited for yet are in the socket, whose end comes behind them.
    `_marks` lie behind `_memory`: the sender's, the receiver's."""

    transport = "shared_memory"
    _side: int  # of the marks this end's

    def __init__(self, wait_s: float, config: TransferConfig, on_failure: OnFailure, on_unusable: OnUnusable) -> None:
        self._wait_s = wait_s
        self._connect_timeout_s = config.connect_timeout_s
        self._on_failure = on_failure
        self._on_unusable = on_unusable
        self._lock = threading.Lock()
        self._waiting = threading.Lock()  # held by whoever reads the socket
        self._failure = ""
        self._socket: socket.socket | None = None
        self._canary: threading.Thread | None = None
        self._unmap()
        self._posted: dict[int, torch.Tensor] = {}
        self._next_number = 0
        self._num_awaited = 0

    def connect(self) -> None:
        self._raise_if_failed()
        try:
            end = self._meet()
        except OSError as error:
            self.fail(str(error))
            raise LinkFailed(str(error)) from None
        end.settimeout(_LOOK_S)
        with self._lock:
            if not self._failure:
                self._socket = end
                self._canary = threading.Thread(target=self._watch, args=(end.fileno(),), name="kv-canary", daemon=True)
                self._canary.start()
                return
        end.close()
        self._raise_if_failed()

    def wait(self, number: int) -> torch.Tensor:
        assert number == self._num_awaited, "operations of a link are awaited in order"
        self._num_awaited += 1
        with self._waiting:
            said = self._next_word(number)
        if len(said) != _WORD.size or _WORD.unpack(said)[0] != number:
            self.fail("the peer broke the link's rules")
            raise LinkFailed(self._failure)
        _, offset, num_bytes = _WORD.unpack(said)
        return self._where(self._posted.pop(number), offset, num_bytes)

    def fail(self, reason: str) -> None:
        if self._set_failure(reason):
            self._on_failure(reason)

    def close(self) -> None:
        self._set_failure("closed")
        with self._lock:
            end, self._socket = self._socket, None
            canary, self._canary = self._canary, None
        if canary is not None:
            canary.join(self._connect_timeout_s)
        if end is not None:
            with self._waiting:
                end.close()
        self._unmap()

    def _next_word(self, number: int) -> bytes:
        """LinkFailed where none comes. What was said before a failure is still heard."""
        end, theirs, deadline = self._socket, self._marks[1 - self._side], time.monotonic() + self._wait_s
        while end is not None:
            try:
                if said := end.recv(_WORD.size + 1):
                    return said
                self.fail("the peer is gone")
            except TimeoutError:
                if is_marked(theirs):
                    self.fail("the peer was killed")
                elif time.monotonic() > deadline:
                    self.fail(f"operation {number} missed its deadline")
            except OSError as error:
                self.fail(str(error))
            if self._failure:
                break
        raise LinkFailed(self._failure)

    def _unmap(self) -> None:
        self._memory = torch.empty(0, dtype=torch.uint8)
        self._marks = torch.zeros(2, MARK_NBYTES, dtype=torch.uint8)

    def _share(self, descriptor: int) -> None:
        """OSError where it cannot be had, or is not a link's."""
        whole = map_segment(descriptor)
        if whole.numel() % MARK_NBYTES or whole.numel() <= self._marks.numel():
            raise OSError(f"{whole.numel()} bytes of shared memory are not a link's")
        self._memory, marks = whole[: -self._marks.numel()], whole[-self._marks.numel() :]
        self._marks = marks.view(2, MARK_NBYTES)

    def _meet(self) -> socket.socket:
        """The other end, memory shared. OSError where it is not there."""
        raise NotImplementedError

    def _where(self, staged: torch.Tensor, offset: int, num_bytes: int) -> torch.Tensor:
        """The bytes of an operation that is done."""
        raise NotImplementedError

    def _take_number(self, number: int, staged: torch.Tensor) -> None:
        assert number == self._next_number, "operations of a link have no gaps"
        self._next_number += 1
        self._raise_if_failed()
        self._posted[number] = staged

    def _say(self, number: int, offset: int = 0, num_bytes: int = 0) -> None:
        end = self._socket
        try:
            if end is None:
                raise OSError("closed")
            end.send(_WORD.pack(number, offset, num_bytes), socket.MSG_DONTWAIT)
        except OSError as error:
            self.fail(str(error))
            raise LinkFailed(self._failure) from None

    def _watch(self, descriptor: int) -> None:
        """For the end of the connection: what is said on it, others hear."""
        connection = select.poll()
        connection.register(descriptor, 0)
        with marking(self._marks[self._side]):
            connection.poll()
        self.fail("the peer is gone")

    def _set_failure(self, reason: str) -> bool:
        """And let the other end know."""
        with self._lock:
            is_first = not self._failure
            self._failure = self._failure or reason
            if is_first and self._socket is not None:
                with suppress(OSError):  # the other end was first
                    self._socket.shutdown(socket.SHUT_RDWR)
            return is_first

    def _raise_if_failed(self) -> None:
        if self._failure:
            raise LinkFailed(self._failure)


class SharedMemorySender(SharedMemoryLink):
    """An operation is done when the receiver has read it: its deadline allows for that."""

    _side = 0

    def __init__(
        self, offer: LinkOffer, config: TransferConfig, on_failure: OnFailure, on_unusable: OnUnusable
    ) -> None:
        super().__init__(config.answer_timeout_s, config, on_failure, on_unusable)
        self._key = offer.prefix
        self._descriptor = -1

    def allocate(self, num_bytes: int) -> torch.Tensor:
        try:
            num_lines = -(-num_bytes // MARK_NBYTES)
            self._descriptor = make_segment(num_lines * MARK_NBYTES + self._marks.numel())
            self._share(self._descriptor)
        except OSError as error:
            self._close_descriptor()
            self._on_unusable(error)
            raise LinkFailed(f"no shared memory: {error}") from None
        return self._memory[:num_bytes]

    def post(self, number: int, staged: torch.Tensor) -> None:
        self._take_number(number, staged)
        offset = staged.data_ptr() - self._memory.data_ptr()
        is_shared = 0 <= offset < self._memory.numel()
        self._say(number, offset if is_shared else _NOWHERE, staged.numel())

    def close(self) -> None:
        super().close()
        self._close_descriptor()

    def _meet(self) -> socket.socket:
        end = go_to(self._key, self._connect_timeout_s)
        try:
            send_segment(end, self._descriptor)
            if not end.recv(1):
                raise OSError("the peer did not take the memory")
        except OSError:
            end.close()
            raise
        self._close_descriptor()
        return end

    def _where(self, staged: torch.Tensor, offset: int, num_bytes: int) -> torch.Tensor:
        return staged

    def _close_descriptor(self) -> None:
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)


class SharedMemoryReceiver(SharedMemoryLink):
    _side = 1

    def __init__(self, config: TransferConfig, on_failure: OnFailure, on_unusable: OnUnusable) -> None:
        super().__init__(config.chunk_timeout_s, config, on_failure, on_unusable)
        self._meeting = MeetingPoint()
        self.offer = LinkOffer("", 0, self._meeting.key, self.transport)

    def allocate(self, num_bytes: int) -> torch.Tensor:
        return private_memory(num_bytes)

    def post(self, number: int, staged: torch.Tensor) -> None:
        """Of staged only the length counts, unless what comes is filler."""
        self._take_number(number, staged)

    def release(self, number: int) -> None:
        self._say(number)

    def close(self) -> None:
        self._set_failure("closed")
        self._meeting.close()
        super().close()

    def _meet(self) -> socket.socket:
        end = self._meeting.meet(self._connect_timeout_s)
        try:
            self._take_in(receive_segment(end))
            end.send(b"!")
        except OSError:
            end.close()
            raise
        self._meeting.close()
        return end

    def _take_in(self, descriptor: int) -> None:
        try:
            self._share(descriptor)
        except OSError as error:
            self._on_unusable(error)
            raise
        finally:
            os.close(descriptor)

    def _where(self, staged: torch.Tensor, offset: int, num_bytes: int) -> torch.Tensor:
        if num_bytes == staged.numel() and offset == _NOWHERE:
            return staged
        if num_bytes != staged.numel() or offset % _ALIGNMENT or offset + num_bytes > self._memory.numel():
            self.fail(f"{num_bytes} bytes at {offset} of {self._memory.numel()} are not what was asked for")
            self._raise_if_failed()
        return self._memory[offset : offset + num_bytes]


class SharedMemoryTransport:
    """Invariant: `beacon` is empty once shared memory could not be had: the next link will not be one of these."""

    def __init__(self, config: TransferConfig) -> None:
        """OSError where this system has nothing of the kind."""
        self._config = config
        self._beacon = Beacon()
        self.beacon = self._beacon.name

    def listen(self, beacon: str, on_failure: OnFailure) -> SharedMemoryReceiver:
        try:
            return SharedMemoryReceiver(self._config, on_failure, self._give_up)
        except OSError as error:
            raise LinkFailed(f"nowhere to listen: {error}") from None

    def dial(self, offer: LinkOffer, on_failure: OnFailure) -> SharedMemorySender:
        return SharedMemorySender(offer, self._config, on_failure, self._give_up)

    def close(self) -> None:
        self.beacon = ""
        self._beacon.close()

    def _give_up(self, error: OSError) -> None:
        logger.warning("no shared memory for KV links: %s", error)
        self.beacon = ""
