"""OpenAI's HTTP API as Starlette routes. Decides nothing about requests but their shape: validation, limits and the
work itself are calls.py's, the same as for gRPC."""

from __future__ import annotations

import asyncio
import contextlib
import time
import uuid
from collections.abc import Sequence
from dataclasses import replace
from typing import TypeVar

from pydantic import BaseModel, ValidationError
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from router.call_writer import CallWriter, CutOff
from router.calls import Caller, Calls, run_all
from router.config import RouterConfig
from router.events import Arrived
from router.http_requests import authenticate, body_of
from router.openai import errors
from router.openai.answers import ChatShape, CompletionShape, Envelope, Json, Shape
from router.openai.errors import ApiError
from router.openai.messages import ChatRequest, CompletionRequest, TokenizeRequest
from router.openai.wire import AnswerOptions, HttpAnswer
from router.served_model import ServedModel
from router.tenants import Tenant
from router.validation import InvalidArgument, PublicRequest

Body = TypeVar("Body", bound=BaseModel)

# What the API has and this server does not, each with the reason.
NOT_SERVED = {
    "/v1/embeddings": "the served model generates text; it has no embeddings to give",
    "/v1/responses": "use /v1/chat/completions: no conversation is kept here",
    "/v1/moderations": "no moderation model is served",
    "/v1/images/generations": "the served model generates text only",
    "/v1/audio/speech": "the served model generates text only",
    "/v1/audio/transcriptions": "the served model generates text only",
    "/v1/files": "no files are kept here",
    "/v1/batches": "no batches are kept here; send the requests themselves",
}


class OpenAIApi:
    def __init__(self, config: RouterConfig, served: ServedModel, calls: Calls) -> None:
        self._config = config
        self._served = served
        self._calls = calls
        self._started_at = int(time.time())

    def routes(self) -> list[Route]:
        return [
            Route("/v1/chat/completions", self._chat, methods=["POST"]),
            Route("/v1/completions", self._completions, methods=["POST"]),
            Route("/v1/models", self._models),
            Route("/v1/models/{model:path}", self._model),
            Route("/tokenize", self._tokenize, methods=["POST"]),
            *(Route(path, _not_served, methods=["GET", "POST", "DELETE"]) for path in NOT_SERVED),
        ]

    # --- generation -----------------------------------------------------------------------------------------------

    async def _chat(self, request: Request) -> Response:
        tenant = authenticate(self._calls, request)
        body = await self._read(request, ChatRequest)
        return await self._generate(request, tenant, body, ChatShape(self._decode_token))

    async def _completions(self, request: Request) -> Response:
        tenant = authenticate(self._calls, request)
        body = await self._read(request, CompletionRequest)
        return await self._generate(request, tenant, body, CompletionShape(self._decode_token))

    async def _generate(
        self, request: Request, tenant: Tenant, body: ChatRequest | CompletionRequest, shape: Shape
    ) -> Response:
        self._check_model(body.model)
        caller = Caller(tenant, trace_context=request.headers.get("traceparent", ""))
        try:
            publics = body.public_requests()
            if not body.request_id:  # one id for the answer, the log and whoever aborts it
                publics = _with_ids(publics)
            arrivals = [await self._calls.read(public, caller) for public in publics]
        except InvalidArgument as error:
            raise errors.of_invalid(error) from error
        except CutOff as cut_off:
            raise errors.of_fail(cut_off.fail) from cut_off
        envelope = Envelope(
            f"{shape.id_prefix}{body.request_id or publics[0].request_id}",
            int(time.time()),
            self._served.name,
            f"fp_{self._served.model_fingerprint[:12]}",
        )
        options = AnswerOptions(
            is_streamed=bool(body.stream),
            usage_with_every_chunk=body.usage_with_every_chunk,
            usage_at_the_end=body.usage_at_the_end,
            has_account=body.include_account,
            n=publics[0].n,
        )
        work = list(zip(publics, arrivals, strict=True))
        return _Generation(self._config, self._calls, tenant, work, envelope, shape, options)

    # --- the rest -------------------------------------------------------------------------------------------------

    async def _models(self, request: Request) -> Response:
        authenticate(self._calls, request)
        return JSONResponse({"object": "list", "data": [self._about_model()]})

    async def _model(self, request: Request) -> Response:
        authenticate(self._calls, request)
        self._check_model(request.path_params["model"])
        return JSONResponse(self._about_model())

    async def _tokenize(self, request: Request) -> Response:
        tenant = authenticate(self._calls, request)
        body = await self._read(request, TokenizeRequest)
        self._check_model(body.model)
        try:
            token_ids = await self._calls.tokenize(body.public_request(), tenant)
        except InvalidArgument as error:
            raise errors.of_invalid(error) from error
        except CutOff as cut_off:
            raise errors.of_fail(cut_off.fail) from cut_off
        return JSONResponse(
            {"count": len(token_ids), "max_model_len": self._served.max_model_len, "tokens": token_ids.tolist()}
        )

    def _about_model(self) -> Json:
        served = self._served
        return {
            "id": served.name,
            "object": "model",
            "created": self._started_at,
            "owned_by": "twinring",
            "max_model_len": served.max_model_len,
        }

    def _check_model(self, model: str | None) -> None:
        if model is not None and model != self._served.name:
            message = f"model: {model!r} is not served here, only {self._served.name!r} is"
            raise ApiError(404, "invalid_request_error", "model_not_found", message, "model")

    async def _read(self, request: Request, shape: type[Body]) -> Body:
        body = await body_of(request, self._config.max_message_bytes, self._config.read_timeout_s)
        try:
            return shape.model_validate_json(body)
        except ValidationError as error:
            raise errors.of_body(error) from error

    def _decode_token(self, token_id: int) -> str:
        return self._served.decode([token_id])


class _Generation(Response):
    """The answer to one call, while its work goes on: an ASGI application, as every response of Starlette is."""

    def __init__(
        self,
        config: RouterConfig,
        calls: Calls,
        tenant: Tenant,
        work: Sequence[tuple[PublicRequest, Arrived]],
        envelope: Envelope,
        shape: Shape,
        options: AnswerOptions,
    ) -> None:
        self._config = config
        self._calls = calls
        self._tenant = tenant
        self._work = work
        self._envelope = envelope
        self._shape = shape
        self._options = options

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """To the last byte, or until the client has gone: then the workers stop at once."""
        running = asyncio.create_task(self._run(send))
        gone = asyncio.create_task(_disconnected(receive))
        try:
            await asyncio.wait({running, gone}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            gone.cancel()
            if not running.done():
                running.cancel()
            await asyncio.gather(gone, running, return_exceptions=True)
        if not running.cancelled():
            running.result()

    async def _run(self, send: Send) -> None:
        answer = HttpAnswer(send, self._envelope, self._shape, self._options)
        with contextlib.suppress(CutOff):  # the writer has told the client
            await run_all(
                self._calls.run(
                    public,
                    arrived,
                    self._options.is_streamed,
                    self._tenant,
                    CallWriter(answer.for_prompt(index), self._config.write_timeout_s),
                )
                for index, (public, arrived) in enumerate(self._work)
            )
            await answer.finish()


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _not_served(request: Request) -> Response:
    path = request.url.path
    message = f"{path} is not served here: {NOT_SERVED[path]}"
    raise ApiError(404, "invalid_request_error", "not_supported", message)


def _with_ids(publics: Sequence[PublicRequest]) -> list[PublicRequest]:
    request_id = uuid.uuid4().hex
    if len(publics) == 1:
        return [replace(publics[0], request_id=request_id)]
    return [replace(public, request_id=f"{request_id}-{index}") for index, public in enumerate(publics)]
