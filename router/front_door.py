"""The public Inference service: a client's call in, its tokens and text out. Decides how a call is answered; where and
how the tokens are made is the Router's affair."""

from __future__ import annotations

import asyncio
import secrets
import time
import uuid
from array import array
from collections.abc import Callable, Sequence
from dataclasses import replace

import grpc

from protos import inference_pb2 as pb
from protos.inference_pb2_grpc import InferenceServicer
from protos.types import GenerateRequest, SamplingParams
from router.call_writer import CallWriter, Context, abort_call
from router.choices import choices_of
from router.client_call import ClientCall
from router.config import RouterConfig
from router.detokenizer import TokenText
from router.driver import Driver
from router.events import AbortRequested, Arrived, Fail
from router.explain import explain
from router.prompts import PromptReader, TooManyPrompts
from router.reply import Reply
from router.responses import explain_response, request_from_proto, server_info_response, worker_load
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
        self._token_text = TokenText.of(served)
        self._driver = driver
        self._status = status
        self._unavailable = unavailable
        self._version = version
        self._prompts = PromptReader(served, config)
        self._started_at = time.monotonic()

    def close(self) -> None:
        self._prompts.close()

    # --- the rpcs -------------------------------------------------------------------------------------------------

    async def Generate(self, message: pb.GenerateRequest, context: Context) -> None:
        public, arrived = await self._arrive(message, context)
        choices = [replace(arrived, request=choice) for choice in choices_of(arrived.request, public.n)]
        writer = CallWriter(context, self._config.write_timeout_s)
        replies = [
            Reply(self._config, self._driver, choice, self._text(public), message.stream, writer) for choice in choices
        ]
        calls = self._driver.open_calls(choices)
        try:
            await _run_all(replies, calls)
        finally:  # also where the client has cancelled
            self._driver.close_calls(calls)

    async def Abort(self, message: pb.AbortRequest, context: object) -> pb.AbortResponse:
        request_ids = self._driver.router.find(TENANT, message.request_id)
        for request_id in request_ids:
            self._driver.feed(AbortRequested(request_id))
        return pb.AbortResponse(found=bool(request_ids))

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

    async def GetServerInfo(self, message: pb.GetServerInfoRequest, context: object) -> pb.GetServerInfoResponse:
        uptime_s = time.monotonic() - self._started_at
        return server_info_response(self._config, self._served.max_model_len, self._version, uptime_s)

    async def ExplainRoute(self, message: pb.GenerateRequest, context: Context) -> pb.ExplainRouteResponse:
        _, arrived = await self._arrive(message, context)
        request = arrived.request
        num_remaining_tokens = request.sampling_params.max_tokens - request.num_committed_tokens
        view = self._driver.router.view
        explanation = explain(
            self._config,
            view,
            arrived.links,
            len(request.token_ids),
            num_remaining_tokens,
            request.priority,
            request.deadline_s,
        )
        return explain_response(explanation, request.num_prompt_tokens, len(request.token_ids))

    async def GetLoads(self, message: pb.GetLoadsRequest, context: object) -> pb.GetLoadsResponse:
        return pb.GetLoadsResponse(workers=self.worker_loads())

    def worker_loads(self) -> list[pb.WorkerLoad]:
        view = self._driver.router.view
        return [
            worker_load(worker, view.find(worker.ref.worker_id, worker.ref.incarnation))
            for worker in self._status.known.values()
        ]

    # --- arrival --------------------------------------------------------------------------------------------------

    async def _arrive(self, message: pb.GenerateRequest, context: Context) -> tuple[PublicRequest, Arrived]:
        """Or the call ends here, with the status that says why."""
        reason = self._unavailable()
        if reason:
            await abort_call(context, Fail(message.request_id, "UNAVAILABLE", reason, retry_after_s=1.0))
        try:
            public = request_from_proto(message)
            return public, await self._read(public, context)
        except InvalidArgument as error:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
        except TooManyPrompts as error:
            await abort_call(context, Fail(message.request_id, "RESOURCE_EXHAUSTED", str(error), retry_after_s=1.0))

    async def _read(self, public: PublicRequest, context: Context) -> Arrived:
        served = self._served
        limits = Limits(served.max_model_len, self._status.max_kv_tokens(), served.vocab_size, served.eos_token_ids)
        check_request(public, limits, self._config)
        token_ids = await self._prompts.token_ids(public)
        sampling_params = to_sampling_params(public, token_ids, limits, draw_seed=lambda: secrets.randbits(63))
        if self._text(public).matched_stop is not None:
            message = "the output had ended, with a stop string"
            raise InvalidArgument("output_token_ids", len(public.output_token_ids), message)
        request = self._internal_request(public, token_ids, sampling_params, context)
        return Arrived(request, self._prompts.links(token_ids, CACHE_SALT))

    def _text(self, public: PublicRequest) -> TextStream:
        """The text of a reply, which goes on behind the output that the caller has."""
        text = TextStream(self._token_text, public.stop, public.min_tokens, public.include_stop)
        text.push(public.output_token_ids)
        return text

    def _internal_request(
        self, public: PublicRequest, token_ids: array[int], sampling_params: SamplingParams, context: Context
    ) -> GenerateRequest:
        request_id = uuid.uuid4().hex
        metadata = dict(context.invocation_metadata() or ())
        return GenerateRequest(
            request_id=request_id,
            client_request_id=public.request_id or f"req-{request_id}",
            attempt=0,
            token_ids=token_ids + array("i", public.output_token_ids),
            num_prompt_tokens=len(token_ids),
            sampling_params=sampling_params,
            tenant=TENANT,
            cache_salt=CACHE_SALT,
            priority=public.priority,
            deadline_s=context.time_remaining(),
            trace_context=str(metadata.get("traceparent", "")),
        )


async def _run_all(replies: Sequence[Reply], calls: Sequence[ClientCall]) -> None:
    """To the end of all of them, or of the first that fails: it has ended the call."""
    tasks = [asyncio.create_task(reply.run(call)) for reply, call in zip(replies, calls, strict=True)]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
