"""How two processes of one machine know and meet each other: by Linux's abstract sockets, which are names in a network
namespace, leave no file, and go with their process. Decides when the other end is the one that was meant."""

from __future__ import annotations

import hmac
import secrets
import socket

_NAME_LENGTH, _HALF_LENGTH = 16, 32  # hex digits: 64 bits are public, 128 bits each end proves itself by


class Beacon:
    """A name that a process of this machine, and no other, can look up. Nothing is ever said to it."""

    def __init__(self) -> None:
        """OSError where there are no such sockets."""
        self.name = secrets.token_hex(16)
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        try:
            self._socket.bind(_address(self.name))
        except OSError:
            self._socket.close()
            raise

    def close(self) -> None:
        self._socket.close()


def is_here(beacon: str) -> bool:
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as visitor:
            visitor.connect(_address(beacon))
    except OSError:
        return False
    return True


class MeetingPoint:
    """Where one end waits for the other. `key` is for the other's eyes: a public name, and a secret for each end."""

    def __init__(self) -> None:
        """OSError where no descriptor is left."""
        self.key = secrets.token_hex((_NAME_LENGTH + 2 * _HALF_LENGTH) // 2)
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._socket.bind(_address(self.key[:_NAME_LENGTH]))
        self._socket.listen(4)
        self._is_closed = False

    def meet(self, timeout_s: float) -> socket.socket:
        """OSError where nobody comes who knows the key. Whoever comes without it is sent away."""
        self._socket.settimeout(timeout_s)
        _, theirs, ours = _parts(self.key)
        while True:
            visitor, _ = self._socket.accept()
            if self._is_closed:
                visitor.close()
                raise OSError("closed")
            visitor.settimeout(timeout_s)
            if _says(visitor, theirs):
                visitor.send(ours)
                return visitor
            visitor.close()

    def close(self) -> None:
        """Wakes `meet`, by a visit: Linux has no other way."""
        self._is_closed = True
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as visitor:
            visitor.setblocking(False)
            visitor.connect_ex(_address(self.key[:_NAME_LENGTH]))
        self._socket.close()


def go_to(key: str, timeout_s: float) -> socket.socket:
    """OSError where nobody waits there who knows the key."""
    name, ours, theirs = _parts(key)
    end = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    end.settimeout(timeout_s)
    try:
        end.connect(_address(name.decode()))
        end.send(ours)
        if not _says(end, theirs):
            raise OSError("the other end is not the one that was meant")
    except OSError:
        end.close()
        raise
    return end


def _parts(key: str) -> tuple[bytes, bytes, bytes]:
    middle = _NAME_LENGTH + _HALF_LENGTH
    return key[:_NAME_LENGTH].encode(), key[_NAME_LENGTH:middle].encode(), key[middle:].encode()


def _says(end: socket.socket, expected: bytes) -> bool:
    try:
        return hmac.compare_digest(end.recv(len(expected) + 1), expected)
    except OSError:
        return False


def _address(name: str) -> str:
    return f"\0twinring-{name}"
