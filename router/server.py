"""Composes the router: one Router, its channels to workers, its public services, one asyncio loop for all of them.
Decides when requests are taken; knows neither Ray nor how workers are started."""

from __future__ import annotations

import asyncio
import importlib.metadata
import logging
import secrets
import time
import uuid

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc  # type: ignore[import-untyped]
from grpc_reflection.v1alpha import reflection  # type: ignore[import-untyped]

from protos import inference_pb2 as pb
from protos.inference_pb2_grpc import add_ClusterServicer_to_server, add_InferenceServicer_to_server
from router.calls import Calls
from router.cluster_service import ClusterService
from router.config import RouterConfig
from router.driver import Driver
from router.events import Tick
from router.front_door import FrontDoor
from router.http_app import HttpApp
from router.http_server import HttpServer
from router.membership import Membership
from router.metrics import RouterMetrics
from router.orders import Orders
from router.published_view import Drain, Lacking, PublishedView, RouterNews
from router.recording import EventRecorder
from router.responses import worker_load
from router.router import Router
from router.served_model import ServedModel
from router.status import ClusterStatus, StatusEvent
from router.tls import read_key_and_chain
from router.worker_channel import RouterIdentity

log = logging.getLogger("twinring.router")

INFERENCE = "twinring.v1.Inference"
CLUSTER = "twinring.v1.Cluster"
TICK_S = 0.25


class RouterServer:
    """Invariant: requests are taken from the moment when the cluster is ready first, or when this router has joined one
    that was, until stop()."""

    def __init__(self, config: RouterConfig, served: ServedModel, router_id: str = "router-0") -> None:
        for name in ("block_size", "hash_block_size"):
            if getattr(config, name) != getattr(served, name):
                raise ValueError(
                    f"{name} of the router is {getattr(config, name)}, of the model {getattr(served, name)}"
                )
        router = Router(config, make_transfer_id=lambda: secrets.token_bytes(16))
        self._config = config
        self._status = ClusterStatus(config, router.view, router_id)
        metrics = RouterMetrics(config, router, self._status)
        self._recorder = EventRecorder(config.record_events, config) if config.record_events else None
        record = self._recorder.record if self._recorder else None
        self._driver = Driver(router, config, metrics, time.monotonic, record)
        identity = RouterIdentity(router_id, uuid.uuid4().hex, served.model_fingerprint)
        self._orders = Orders()
        self._membership = Membership(config, identity, self._driver, self._status, self.note_event, self._orders)
        version = _version()
        self._calls = Calls(config, served, self._driver, self._status, metrics, self._unavailable)
        self._front_door = FrontDoor(config, served, self._calls, self._worker_loads, version)
        self._cluster = ClusterService(
            config, self._calls, router, self._status, self._orders, self._worker_loads, served.name, version
        )
        app = HttpApp(config, served, self._calls, router, self._status, metrics, self._cannot_serve, version)
        self._http = HttpServer(app.asgi, config)
        self.http_port: int | None = None  # None: not listening
        self._health = health.aio.HealthServicer()
        self._server: grpc.aio.Server | None = None
        self._ticker: asyncio.Task[None] | None = None
        self._was_ready = asyncio.Event()
        self._is_stopping = False
        self._loop: asyncio.AbstractEventLoop | None = None

    # --- start and stop -------------------------------------------------------------------------------------------

    async def start(self) -> int:
        """Listens; the port of gRPC. OSError where an address cannot be had or a certificate cannot be read."""
        key_and_chain = read_key_and_chain(self._config)
        options = (
            ("grpc.max_receive_message_length", self._config.max_message_bytes),
            ("grpc.so_reuseport", 0),  # a second router on the same port must fail, not share its clients
        )
        server = grpc.aio.server(options=options)
        add_InferenceServicer_to_server(self._front_door, server)
        add_ClusterServicer_to_server(self._cluster, server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        reflection.enable_server_reflection((INFERENCE, CLUSTER, health.SERVICE_NAME, reflection.SERVICE_NAME), server)
        try:
            port = self._add_port(server, key_and_chain)
        except RuntimeError as error:
            raise OSError(f"cannot listen on {self._config.listen}: {error}") from error
        if self._config.http_listen:
            self.http_port = await self._http.start()
        await self._set_health(health_pb2.HealthCheckResponse.NOT_SERVING)
        await server.start()
        self._server, self._loop = server, asyncio.get_running_loop()
        self._ticker = asyncio.create_task(self._tick())
        self._ticker.add_done_callback(_log_bug)
        return port

    def _add_port(self, server: grpc.aio.Server, key_and_chain: tuple[bytes, bytes] | None) -> int:
        if key_and_chain is None:
            return server.add_insecure_port(self._config.listen)
        return server.add_secure_port(self._config.listen, grpc.ssl_server_credentials([key_and_chain]))

    async def stop(self, grace_s: float) -> None:
        """Takes no more requests, lets those in flight end within grace_s, then leaves the workers."""
        self._is_stopping = True
        await self._health.enter_graceful_shutdown()
        await asyncio.gather(self._http.stop(grace_s), *([self._server.stop(grace_s)] if self._server else []))
        await self._membership.close()
        if self._ticker is not None:
            self._ticker.cancel()
        self._calls.close()
        if self._recorder is not None:
            self._recorder.close()

    def leave(self) -> None:
        """Called on any thread: have this router drained, and another one put in its place, as an operator might."""
        assert self._loop is not None, "it has not started"
        order = self._orders.place(Drain(self._status.router_id, replaces=True))
        asyncio.run_coroutine_threadsafe(order, self._loop)

    # --- workers --------------------------------------------------------------------------------------------------

    async def take(self, view: PublishedView) -> tuple[Lacking, ...]:
        """Serve with the members of this view; which of them cannot be reached."""
        return await self._membership.take(view)

    async def news(self) -> RouterNews:
        """What the publisher of views must hear."""
        return await self._membership.news()

    def answer(self, order_id: int, refusal: str) -> None:
        """To an order that news() has told of; empty: it is carried out."""
        self._orders.answer(order_id, refusal)

    def note_event(self, message: str) -> None:
        self._status.events.append(StatusEvent(time.time(), message))

    def _worker_loads(self) -> list[pb.WorkerLoad]:
        view = self._driver.router.view
        return [
            worker_load(worker, view.find(worker.ref.worker_id, worker.ref.incarnation))
            for worker in self._status.known.values()
        ]

    # --- readiness ------------------------------------------------------------------------------------------------

    @property
    def is_ready(self) -> bool:
        return not self._status.shortfall()

    async def wait_ready(self, timeout_s: float) -> None:
        """TimeoutError says what is missing."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._was_ready.wait()
        except TimeoutError:
            raise TimeoutError(f"not ready after {timeout_s:g} s: {self._status.shortfall()}") from None

    def _unavailable(self) -> str:
        if self._is_stopping:
            return "stopping"
        return "" if self._was_ready.is_set() else f"not ready: {self._status.shortfall()}"

    def _cannot_serve(self) -> str:
        """Unlike `is_ready`, a cluster that has been whole and lost some of its workers still serves."""
        reason = self._unavailable()
        if not reason and not self._driver.router.view.prefill_workers():
            reason = "no worker that prefills is up"
        return reason

    async def _tick(self) -> None:
        while True:
            self._driver.feed(Tick())
            is_late = self._membership.is_late and self._status.serves_the_view()
            if (self.is_ready or is_late) and not self._was_ready.is_set():
                self._was_ready.set()
                await self._set_health(health_pb2.HealthCheckResponse.SERVING)
                self.note_event("ready")
            await asyncio.sleep(TICK_S)

    async def _set_health(self, serving: health_pb2.HealthCheckResponse.ServingStatus) -> None:
        for service in ("", INFERENCE, CLUSTER):
            await self._health.set(service, serving)


def _log_bug(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and task.exception() is not None:
        log.error("bug in the router's clock", exc_info=task.exception())


def _version() -> str:
    try:
        return importlib.metadata.version("twinring")
    except importlib.metadata.PackageNotFoundError:  # run from a checkout
        return "unknown"
