"""Memory that two processes share: made by one, handed to the other over a socket. It never has a name in any file
system, so that nothing is left of it when both have ended, however they ended, and no mount's size bounds it."""

from __future__ import annotations

import fcntl
import mmap
import os
import socket
from contextlib import suppress

import torch

_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL  # a size that changed would kill whoever reads


def make_segment(num_bytes: int) -> int:
    """Its descriptor. OSError where there is none to be had."""
    descriptor = os.memfd_create("twinring-kv", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(descriptor, num_bytes)
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, _SEALS)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def map_segment(descriptor: int) -> torch.Tensor:  # [num_bytes], uint8
    """Mapped for as long as a tensor has it; the descriptor stays the caller's. OSError where it cannot be had."""
    memory = mmap.mmap(descriptor, os.fstat(descriptor).st_size)
    with suppress(OSError):  # a kernel without them
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8)


def send_segment(end: socket.socket, descriptor: int) -> None:
    socket.send_fds(end, [b"segment"], [descriptor])


def receive_segment(end: socket.socket) -> int:
    """OSError where none comes, or one whose size may still change."""
    _, descriptors, _, _ = socket.recv_fds(end, 16, 1, socket.MSG_CMSG_CLOEXEC)
    if len(descriptors) == 1:
        if fcntl.fcntl(descriptors[0], fcntl.F_GET_SEALS) & _SEALS == _SEALS:
            return descriptors[0]
        os.close(descriptors[0])
    raise OSError("no sealed segment came")
