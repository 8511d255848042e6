"""A word in shared memory by which one process sees at once that a thread of another has ended. The kernel sets it when
it ends the thread, also a killed process's, and before it takes that process's memory apart; sockets it closes only
after that, which takes long where there is much memory. Linux calls it a robust futex; nobody waits for this one."""

from __future__ import annotations

import ctypes
import platform
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

MARK_NBYTES = 64  # a cache line; the word is its first four bytes
_NUMBERS = {"x86_64": (273, 274), "aarch64": (99, 100)}  # of the system calls set_robust_list, get_robust_list
_HEAD_NBYTES = 24  # struct robust_list_head: first entry, from an entry to its word, entry in the making
_OWNER_DIED = 0x4000_0000

_libc = ctypes.CDLL(None)


@contextmanager
def marking(mark: torch.Tensor) -> Iterator[None]:  # [MARK_NBYTES], uint8, shared
    """Whoever kills the calling thread in here sets the mark; nobody does where the system does not know how. What the
    kernel follows to find the word lies in memory of our own, where no peer can bend it."""
    number_to_set, number_to_get = _NUMBERS.get(platform.machine(), (-1, -1))
    former, size = ctypes.c_void_p(), ctypes.c_size_t()  # libc's own: this thread holds none of its robust locks
    if _libc.syscall(number_to_get, 0, ctypes.byref(former), ctypes.byref(size)) != 0:
        yield
        return
    head = (ctypes.c_long * 4)()
    address = ctypes.addressof(head)
    entry = address + _HEAD_NBYTES
    head[0], head[1], head[2], head[3] = entry, mark.data_ptr() - entry, 0, address  # the last: entry, that ends here
    _libc.syscall(number_to_set, head, ctypes.c_size_t(_HEAD_NBYTES))
    mark.view(torch.int32)[0] = threading.get_native_id()
    try:
        yield
    finally:
        _libc.syscall(number_to_set, former, size)


def is_marked(mark: torch.Tensor) -> bool:
    return bool(int(mark.view(torch.int32)[0]) & _OWNER_DIED)
