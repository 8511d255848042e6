"""The public Cluster service, for operators: a view of the cluster, and orders to change it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import grpc

from protos import inference_pb2 as pb
from protos.inference_pb2_grpc import ClusterServicer
from router.calls import Calls
from router.config import RouterConfig
from router.grpc_call import authenticate
from router.orders import Orders
from router.published_view import Drain, Order, Scale
from router.router import Router
from router.status import ClusterStatus


class ClusterService(ClusterServicer):
    def __init__(
        self,
        config: RouterConfig,
        calls: Calls,
        router: Router,
        status: ClusterStatus,
        orders: Orders,
        worker_loads: Callable[[], list[pb.WorkerLoad]],
        model: str,
        version: str,
    ) -> None:
        self._config = config
        self._calls = calls
        self._router = router
        self._status = status
        self._orders = orders
        self._worker_loads = worker_loads
        self._model = model
        self._version = version

    async def GetStatus(self, message: pb.GetStatusRequest, context: Any) -> pb.GetStatusResponse:
        await authenticate(self._calls, context, operators_only=True)
        shortfall = self._status.shortfall()
        statistics = self._router.statistics
        return pb.GetStatusResponse(
            ready=not shortfall,
            message=f"not ready: {shortfall}" if shortfall else "ready",
            mode=self._config.mode,
            model=self._model,
            version=self._version,
            num_requests_in_flight=self._router.num_in_flight,
            num_requests_finished=statistics.num_finished,
            num_failovers=statistics.num_failovers,
            view_version=self._status.view_version,
            router_id=self._status.router_id,
            workers=self._worker_loads(),
            events=[pb.ClusterEvent(at_unix_s=event.at_unix_s, message=event.message) for event in self._status.events],
        )

    async def Drain(self, message: pb.DrainRequest, context: Any) -> pb.DrainResponse:
        timeout_s = message.timeout_s if message.HasField("timeout_s") else None
        await self._place(Drain(message.who, timeout_s, message.replace), context)
        return pb.DrainResponse()

    async def Scale(self, message: pb.ScaleRequest, context: Any) -> pb.ScaleResponse:
        await self._place(Scale(tuple(sorted(message.sizes.items()))), context)
        return pb.ScaleResponse()

    async def _place(self, order: Order, context: Any) -> None:
        await authenticate(self._calls, context, operators_only=True)
        refusal = await self._orders.place(order)
        if refusal:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, refusal)
