"""The stores in which the two ends of a process group find each other: the receiver hosts one for all links into it.
Knows nothing of what is then done with the group."""

from __future__ import annotations

import secrets
import socket
from datetime import timedelta

from torch._C._distributed_c10d import Store, TCPStore

from kvtransfer.config import TransferConfig
from kvtransfer.messages import LinkOffer


class HostedStore:
    """Invariant: no two offers have the same prefix; a group that failed leaves stale addresses under its own."""

    def __init__(self, config: TransferConfig, transport: str) -> None:
        self._config = config
        self._transport = transport
        self._store: TCPStore | None = None
        self._port = 0

    def new_offer(self) -> tuple[LinkOffer, Store]:
        store = self._store or self._host()
        return LinkOffer(self._config.bind_host, self._port, secrets.token_hex(16), self._transport), store

    def close(self) -> None:
        self._store = None

    def _host(self) -> TCPStore:
        """Bound by us: left to itself the store listens on every interface."""
        host = self._config.bind_host
        listener = socket.create_server((host, 0))
        self._port = listener.getsockname()[1]
        timeout = timedelta(seconds=self._config.connect_timeout_s)
        self._store = TCPStore(
            host,
            self._port,
            is_master=True,
            timeout=timeout,
            wait_for_workers=False,
            master_listen_fd=listener.detach(),
        )
        return self._store


def open_store(offer: LinkOffer, config: TransferConfig) -> Store:
    """The other end's. RuntimeError where it is not there."""
    # A store client tries twice, each time for as long as it is given.
    timeout = timedelta(seconds=config.connect_timeout_s / 2)
    return TCPStore(offer.host, offer.port, is_master=False, timeout=timeout)
