"""The public Inference service over gRPC: messages to plain values and back, errors to status codes. What becomes of a
call is calls.py's affair."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import grpc

from protos import inference_pb2 as pb
from protos.inference_pb2_grpc import InferenceServicer
from router.call_writer import CallWriter, CutOff
from router.calls import Caller, Calls
from router.config import RouterConfig
from router.events import Arrived, Fail
from router.grpc_call import authenticate, end_call
from router.parts import Part
from router.responses import explain_response, generate_response, request_from_proto, server_info_response
from router.served_model import ServedModel
from router.validation import InvalidArgument, PublicRequest

Context = grpc.aio.ServicerContext[pb.GenerateRequest, pb.GenerateResponse]


class FrontDoor(InferenceServicer):
    def __init__(
        self,
        config: RouterConfig,
        served: ServedModel,
        calls: Calls,
        worker_loads: Callable[[], list[pb.WorkerLoad]],
        version: str,
    ) -> None:
        self._config = config
        self._served = served
        self._calls = calls
        self._worker_loads = worker_loads
        self._version = version
        self._started_at = time.monotonic()

    async def Generate(self, message: pb.GenerateRequest, context: Context) -> None:
        caller = await self._caller(context)
        public, arrived = await self._arrive(message, caller, context)
        writer = CallWriter(_GrpcWire(context), self._config.write_timeout_s)
        await self._calls.run(public, arrived, message.stream, caller.tenant, writer)

    async def Abort(self, message: pb.AbortRequest, context: Any) -> pb.AbortResponse:
        caller = await self._caller(context)
        return pb.AbortResponse(found=self._calls.abort(caller.tenant, message.request_id))

    async def GetModelInfo(self, message: pb.GetModelInfoRequest, context: Any) -> pb.GetModelInfoResponse:
        await self._caller(context)
        served = self._served
        return pb.GetModelInfoResponse(
            model=served.name,
            architecture=served.architecture,
            dtype=served.dtype,
            vocab_size=served.vocab_size,
            max_model_len=served.max_model_len,
            eos_token_ids=served.eos_token_ids,
            model_fingerprint=served.model_fingerprint,
            block_size=served.block_size,
            hash_block_size=served.hash_block_size,
            server_version=self._version,
        )

    async def GetServerInfo(self, message: pb.GetServerInfoRequest, context: Any) -> pb.GetServerInfoResponse:
        await self._caller(context)
        uptime_s = time.monotonic() - self._started_at
        return server_info_response(self._config, self._served.max_model_len, self._version, uptime_s)

    async def ExplainRoute(self, message: pb.GenerateRequest, context: Context) -> pb.ExplainRouteResponse:
        _, arrived = await self._arrive(message, await self._caller(context), context)
        request = arrived.request
        return explain_response(self._calls.explain(arrived), request.num_prompt_tokens, self._calls.view_version)

    async def GetLoads(self, message: pb.GetLoadsRequest, context: Any) -> pb.GetLoadsResponse:
        await authenticate(self._calls, context, operators_only=True)
        return pb.GetLoadsResponse(workers=self._worker_loads())

    async def _caller(self, context: Context) -> Caller:
        metadata = dict(context.invocation_metadata() or ())
        tenant = await authenticate(self._calls, context)
        return Caller(tenant, context.time_remaining(), str(metadata.get("traceparent", "")))

    async def _arrive(
        self, message: pb.GenerateRequest, caller: Caller, context: Context
    ) -> tuple[PublicRequest, Arrived]:
        """Or the call ends here, with the status that says why."""
        try:
            public = request_from_proto(message)
            return public, await self._calls.read(public, caller)
        except InvalidArgument as error:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
        except CutOff as cut_off:
            await end_call(context, cut_off.fail)


class _GrpcWire:
    def __init__(self, context: Context) -> None:
        self._context = context

    async def send(self, part: Part) -> None:
        await self._context.write(generate_response(part))

    async def send_failure(self, fail: Fail) -> None:
        await end_call(self._context, fail)
