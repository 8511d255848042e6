"""What a worker answers to probes (grpc.health.v1): "live" while its engine makes progress, "ready" (also "") while,
besides, a router holds its lease. Only shows this; who ends a worker is decided in worker_host.py."""

from __future__ import annotations

import asyncio

import grpc.aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc  # type: ignore[import-untyped]

from engine.worker_host import WorkerHost

Status = health_pb2.HealthCheckResponse


class WorkerHealth:
    """Has a task of its own: a probe that does not read its answers must not delay a heartbeat."""

    def __init__(self, host: WorkerHost) -> None:
        self._host = host
        self._servicer = health.aio.HealthServicer()

    def add_to_server(self, server: grpc.aio.Server) -> None:
        health_pb2_grpc.add_HealthServicer_to_server(self._servicer, server)

    async def show(self) -> None:
        """Once before the server starts, or the first probes are told that the service is unknown."""
        is_live = self._host.is_live
        is_ready = is_live and self._host.has_router
        for service, serves in (("live", is_live), ("ready", is_ready), ("", is_ready)):
            await self._servicer.set(service, Status.SERVING if serves else Status.NOT_SERVING)

    async def keep(self, interval_s: float) -> None:
        while True:
            await asyncio.sleep(interval_s)
            await self.show()

    async def stop(self) -> None:
        """NOT_SERVING from here on."""
        await self._servicer.enter_graceful_shutdown()
