"""Serves an ASGI application on the router's own event loop, and stops it within a grace. Decides nothing about
requests."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Iterator

import uvicorn
from starlette.types import ASGIApp

from router.config import RouterConfig

BACKLOG = 2048
MIN_GRACE_S = 0.05
KEEP_ALIVE_S = 75  # longer than load balancers keep an idle connection: it is theirs to close


class _Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Signals are the process's affair."""
        yield


class HttpServer:
    def __init__(self, app: ASGIApp, config: RouterConfig) -> None:
        self._listen = config.http_listen
        settings = uvicorn.Config(
            app,
            log_config=None,
            access_log=False,
            lifespan="off",
            ws="none",
            server_header=False,
            timeout_keep_alive=KEEP_ALIVE_S,
            limit_concurrency=config.max_http_connections,
            ssl_certfile=config.tls_cert,
            ssl_keyfile=config.tls_key,
        )
        self._server = _Server(settings)
        self._serving: asyncio.Task[None] | None = None

    async def start(self) -> int:
        """Listens; the port. OSError where the address cannot be had or the certificate cannot be read."""
        self._server.config.load()
        host, _, port = self._listen.rpartition(":")
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            listener = socket.create_server((host.strip("[]"), int(port)), family=family, backlog=BACKLOG)
        except OSError as error:
            raise OSError(f"cannot listen on {self._listen}: {error}") from error
        # Python's loop would set it on its own sockets only; without it a short answer waits for an acknowledgement.
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._serving = asyncio.create_task(self._server.serve([listener]))
        return int(listener.getsockname()[1])

    async def stop(self, grace_s: float) -> None:
        """Accepts no more, lets what runs end within grace_s. May be called again with less."""
        if self._serving is None:
            return
        # It may be a fraction; and it must be a moment, or closing what is idle counts as late.
        self._server.config.timeout_graceful_shutdown = max(grace_s, MIN_GRACE_S)  # type: ignore[assignment]
        self._server.force_exit = grace_s == 0
        self._server.should_exit = True
        await asyncio.shield(self._serving)
