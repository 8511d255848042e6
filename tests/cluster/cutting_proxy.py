"""A TCP proxy that cuts its connections in the middle of what the server says."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
from collections.abc import Iterator, Sequence

PIECE = 64  # bytes relayed at a time: a cut falls anywhere
RESET_ON_CLOSE = struct.pack("ii", 1, 0)


class CuttingProxy:
    """The i-th connection is reset after budgets[i] bytes from the server; those behind the last budget live."""

    def __init__(self, target: str, budgets: Sequence[int]) -> None:
        host, _, port = target.rpartition(":")
        self._target = (host, int(port))
        self._budgets = list(budgets)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._open: list[socket.socket] = []
        self.num_cuts = 0
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        for one in (self._listener, *self._open):
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            one.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # the listener is closed
            while True:
                client, _ = self._listener.accept()
                server = socket.create_connection(self._target)
                self._open += [client, server]
                budget = self._budgets.pop(0) if self._budgets else None
                threading.Thread(target=self._relay, args=(client, server, None), daemon=True).start()
                threading.Thread(target=self._relay, args=(server, client, budget), daemon=True).start()

    def _relay(self, source: socket.socket, sink: socket.socket, budget: int | None) -> None:
        num_relayed = 0
        with contextlib.suppress(OSError):
            while data := source.recv(PIECE):
                if budget is not None and num_relayed + len(data) > budget:
                    self.num_cuts += 1
                    break
                sink.sendall(data)
                num_relayed += len(data)
        for one in (source, sink):
            with contextlib.suppress(OSError):
                one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)
                one.shutdown(socket.SHUT_RDWR)
            one.close()


@contextlib.contextmanager
def cutting(target: str, *budgets: int) -> Iterator[CuttingProxy]:
    proxy = CuttingProxy(target, budgets)
    try:
        yield proxy
    finally:
        proxy.close()
