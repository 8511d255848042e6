"""Links between two processes of one machine: what is posted lies in memory that both have, and the receiver reads it
there, so that nothing is copied on the way. Decides when the sender may write there again: once the receiver has said
that it has read it. A socket between the two carries those words, and its end tells each that the other is gone.
The receiver waits for the sender, as over gloo."""

from __future__ import annotations

import logging
import os
import socket
import struct
import threading
from collections.abc import Callable
from contextlib import suppress
from queue import Empty, SimpleQueue

import torch

from kvtransfer.config import TransferConfig
from kvtransfer.local_socket import Beacon, MeetingPoint, go_to
from kvtransfer.messages import LinkOffer
from kvtransfer.segment import make_segment, map_segment, receive_segment, send_segment
from kvtransfer.transport import LinkFailed, OnFailure

logger = logging.getLogger("twinring.kvtransfer")

_WORD = struct.Struct("<QQQ")  # operation, offset, bytes; the same word back: read
_NOWHERE = (1 << 64) - 1  # the offset of filler
_ALIGNMENT = 8  # of an offset: that of every dtype, and of a checksum's words
_MAX_NUM_UNAWAITED = 1024  # far more than are ever open at once

OnUnusable = Callable[[OSError], None]


class SharedMemoryLink:
    """Invariant: once `_failure` is set, every call raises LinkFailed; it is set once, and told unless by close.
    `_words` has those that came and that nobody has waited for yet, in order, and then None if the link has failed."""

    transport = "shared_memory"

    def __init__(self, wait_s: float, config: TransferConfig, on_failure: OnFailure, on_unusable: OnUnusable) -> None:
        self._wait_s = wait_s
        self._connect_timeout_s = config.connect_timeout_s
        self._on_failure = on_failure
        self._on_unusable = on_unusable
        self._lock = threading.Lock()
        self._failure = ""
        self._socket: socket.socket | None = None
        self._canary: threading.Thread | None = None
        self._memory = torch.empty(0, dtype=torch.uint8)
        self._posted: dict[int, torch.Tensor] = {}
        self._next_number = 0
        self._words: SimpleQueue[tuple[int, int] | None] = SimpleQueue()  # offset, bytes
        self._num_heard = self._num_awaited = 0

    def connect(self) -> None:
        self._raise_if_failed()
        try:
            end = self._meet()
        except OSError as error:
            self.fail(str(error))
            raise LinkFailed(str(error)) from None
        end.settimeout(None)
        with self._lock:
            if not self._failure:
                self._socket = end
                self._canary = threading.Thread(target=self._listen, args=(end,), name="kv-canary", daemon=True)
                self._canary.start()
                return
        end.close()
        self._raise_if_failed()

    def wait(self, number: int) -> torch.Tensor:
        assert number == self._num_awaited, "operations of a link are awaited in order"
        self._num_awaited += 1
        try:
            word = self._words.get(timeout=self._wait_s)
        except Empty:
            self.fail(f"operation {number} missed its deadline")
            word = None
        if word is None:
            self._words.put(None)  # for whoever waits next
            raise LinkFailed(self._failure)
        return self._where(self._posted.pop(number), *word)

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
            end.close()
        self._memory = torch.empty(0, dtype=torch.uint8)

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

    def _listen(self, end: socket.socket) -> None:
        while True:
            try:
                said = end.recv(_WORD.size + 1)
            except OSError as error:
                return self.fail(str(error))
            if not said:
                return self.fail("the peer is gone")
            if len(said) != _WORD.size or not self._hear(*_WORD.unpack(said)):
                return self.fail("the peer broke the link's rules")

    def _hear(self, number: int, offset: int, num_bytes: int) -> bool:
        if number != self._num_heard or self._words.qsize() >= _MAX_NUM_UNAWAITED:
            return False
        self._num_heard += 1
        self._words.put((offset, num_bytes))
        return True

    def _set_failure(self, reason: str) -> bool:
        """And let the other end know."""
        with self._lock:
            is_first = not self._failure
            self._failure = self._failure or reason
            self._words.put(None)
            if is_first and self._socket is not None:
                with suppress(OSError):  # the other end was first
                    self._socket.shutdown(socket.SHUT_RDWR)
            return is_first

    def _raise_if_failed(self) -> None:
        if self._failure:
            raise LinkFailed(self._failure)


class SharedMemorySender(SharedMemoryLink):
    """An operation is done when the receiver has read it: its deadline allows for that."""

    def __init__(
        self, offer: LinkOffer, config: TransferConfig, on_failure: OnFailure, on_unusable: OnUnusable
    ) -> None:
        super().__init__(config.answer_timeout_s, config, on_failure, on_unusable)
        self._key = offer.prefix
        self._descriptor = -1

    def allocate(self, num_bytes: int) -> torch.Tensor:
        try:
            self._descriptor = make_segment(num_bytes)
            self._memory = map_segment(self._descriptor)
        except OSError as error:
            self._close_descriptor()
            self._on_unusable(error)
            raise LinkFailed(f"no shared memory: {error}") from None
        return self._memory

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
    def __init__(self, config: TransferConfig, on_failure: OnFailure, on_unusable: OnUnusable) -> None:
        super().__init__(config.chunk_timeout_s, config, on_failure, on_unusable)
        self._meeting = MeetingPoint()
        self.offer = LinkOffer("", 0, self._meeting.key, self.transport)

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
            self._memory = self._mapped(receive_segment(end))
            end.send(b"!")
        except OSError:
            end.close()
            raise
        self._meeting.close()
        return end

    def _mapped(self, descriptor: int) -> torch.Tensor:
        try:
            return map_segment(descriptor)
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
