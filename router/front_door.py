"""The public Inference service: a client's call in, its tokens and text out. Decides how a call is answered; where and
how the tokens are made is the Router's affair."""

from __future__ import annotations

import secrets
import uuid
from array import array
from collections.abc import Callable

import grpc

from protos import inference_pb2 as pb
from protos.inference_pb2_grpc import InferenceServicer
from protos.types import GenerateRequest, SamplingParams
from router.config import RouterConfig
from router.driver import Driver
from router.events import AbortRequested, Arrived, Fail
from router.prompts import PromptReader, TooManyPrompts
from router.reply import Context, Reply, abort_call
from router.responses import request_from_proto, worker_load
from router.served_model import ServedModel
from router.status import ClusterStatus
from router.text_stream import TextStream
from router.validation import InvalidArgument, Limits, PublicRequest, check_request, to_sampling_params

TENANT = ""  # one tenant, until callers authenticate
CACHE_SALT = b""


class FrontDoor(InferenceServicer):
    def __init__(
        self,
        config: RouterConfig,
        served: ServedModel,
        driver: Driver,
        status: ClusterStatus,
        unavailable: Callable[[], str],
        version: str,
    ) -> None:
        """`unavailable` says why no request is taken now; empty: they are taken."""
        self._config = config
        self._served = served
        self._driver = driver
        self._status = status
        self._unavailable = unavailable
        self._version = version
        self._prompts = PromptReader(served, config)

    def close(self) -> None:
        self._prompts.close()

    # --- the rpcs -------------------------------------------------------------------------------------------------

    async def Generate(self, message: pb.GenerateRequest, context: Context) -> None:
        reason = self._unavailable()
        if reason:
            await abort_call(context, Fail(message.request_id, "UNAVAILABLE", reason, retry_after_s=1.0))
        public = request_from_proto(message)
        try:
            arrived = await self._arrive(public, context)
        except InvalidArgument as error:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
        except TooManyPrompts as error:
            await abort_call(context, Fail(public.request_id, "RESOURCE_EXHAUSTED", str(error), retry_after_s=1.0))
        call = self._driver.open_call(arrived)
        try:
            text = TextStream(self._served.decode, public.stop)
            await Reply(self._config, self._driver, arrived, text, message.stream).run(call, context)
        finally:  # also where the client has cancelled
            self._driver.close_call(call)

    async def Abort(self, message: pb.AbortRequest, context: object) -> pb.AbortResponse:
        request_id = self._driver.router.find(TENANT, message.request_id)
        if request_id is None:
            return pb.AbortResponse(found=False)
        self._driver.feed(AbortRequested(request_id))
        return pb.AbortResponse(found=True)

    async def GetModelInfo(self, message: pb.GetModelInfoRequest, context: object) -> pb.GetModelInfoResponse:
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

    async def GetLoads(self, message: pb.GetLoadsRequest, context: object) -> pb.GetLoadsResponse:
        return pb.GetLoadsResponse(workers=self.worker_loads())

    def worker_loads(self) -> list[pb.WorkerLoad]:
        view = self._driver.router.view
        return [
            worker_load(worker, view.find(worker.ref.worker_id, worker.ref.incarnation))
            for worker in self._status.known.values()
        ]

    # --- arrival --------------------------------------------------------------------------------------------------

    async def _arrive(self, public: PublicRequest, context: Context) -> Arrived:
        served = self._served
        limits = Limits(served.max_model_len, self._status.max_kv_tokens(), served.vocab_size, served.eos_token_ids)
        check_request(public, limits, self._config)
        token_ids = await self._prompts.token_ids(public)
        sampling_params = to_sampling_params(public, token_ids, limits, draw_seed=lambda: secrets.randbits(63))
        request = self._internal_request(public, token_ids, sampling_params, context)
        return Arrived(request, self._prompts.links(token_ids, CACHE_SALT))

    def _internal_request(
        self, public: PublicRequest, token_ids: array[int], sampling_params: SamplingParams, context: Context
    ) -> GenerateRequest:
        request_id = uuid.uuid4().hex
        metadata = dict(context.invocation_metadata() or ())
        return GenerateRequest(
            request_id=request_id,
            client_request_id=public.request_id or f"req-{request_id}",
            attempt=0,
            token_ids=token_ids,
            num_prompt_tokens=len(token_ids),
            sampling_params=sampling_params,
            tenant=TENANT,
            cache_salt=CACHE_SALT,
            deadline_s=context.time_remaining(),
            trace_context=str(metadata.get("traceparent", "")),
        )
