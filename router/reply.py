"""The answer to one Generate call: text from tokens, chunks or one whole, the last word, the log line."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import asdict
from typing import NoReturn

import grpc

from protos import inference_pb2 as pb
from protos.types import FinishReason
from router.client_call import ClientCall
from router.config import RouterConfig
from router.driver import Driver
from router.events import Arrived, Deliver, Fail, StopMatched
from router.responses import Progress, chunk_response, complete_response
from router.text_stream import TextStream

log = logging.getLogger("twinring.router")

Context = grpc.aio.ServicerContext[pb.GenerateRequest, pb.GenerateResponse]


class Reply:
    """Invariant: tokens [0, _num_sent) and their text have been written; the ones up to _text.num_tokens wait in
    _token_ids and _unsent_text, for the next chunk or the last word."""

    def __init__(self, config: RouterConfig, driver: Driver, arrived: Arrived, text: TextStream, stream: bool) -> None:
        self._config = config
        self._driver = driver
        self._request = arrived.request
        self._text = text
        self._stream = stream
        self._token_ids: list[int] = []
        self._unsent_text = ""
        self._num_sent = 0
        self._is_logged = False

    async def run(self, call: ClientCall, context: Context) -> None:
        try:
            is_open = True
            while is_open:
                news = await call.take()  # no deadline: the last word or the client's cancellation ends the wait
                is_open = isinstance(news, Deliver) and news.finish_reason is None
                await (self._deliver(news, context) if isinstance(news, Deliver) else self._cut_off(context, news))
        except asyncio.CancelledError:
            self._log("CANCELLED")
            raise

    async def _deliver(self, news: Deliver, context: Context) -> None:
        self._take(news)
        if news.finish_reason is not None:
            await self._finish(news, news.finish_reason, context)
        elif self._stream and self._text.matched_stop is None:
            response = chunk_response(self._request.client_request_id, self._progress(news))
            await self._write(context, response)

    async def _finish(self, news: Deliver, finish_reason: FinishReason, context: Context) -> None:
        assert news.account is not None
        matched: str | int | None = self._text.matched_stop
        if matched is not None:
            finish_reason = FinishReason.STOP  # wherever the workers had gone on to
        elif finish_reason is FinishReason.STOP:
            matched = news.token_ids[-1]  # the token that stops an output comes with the last word
        progress = self._progress(news)
        client_request_id = self._request.client_request_id
        await self._write(context, complete_response(client_request_id, progress, finish_reason, matched, news.account))
        self._log(
            finish_reason.value,
            num_prompt_tokens=progress.num_prompt_tokens,
            num_output_tokens=progress.num_output_tokens,
            **asdict(news.account),
        )

    def _take(self, news: Deliver) -> None:
        if self._text.matched_stop is not None:
            return  # the output has ended before these
        before = self._text.num_tokens
        self._unsent_text += self._text.push(news.token_ids)
        self._token_ids += news.token_ids[: self._text.num_tokens - before]
        if self._text.matched_stop is not None:
            self._driver.feed(StopMatched(self._request.request_id))
        elif news.finish_reason is not None:
            self._unsent_text += self._text.flush()

    def _progress(self, news: Deliver) -> Progress:
        """What has not been sent, which is sent with this."""
        progress = Progress(
            self._num_sent,
            self._token_ids,
            self._unsent_text,
            self._request.num_prompt_tokens,
            news.num_cached_tokens,
        )
        self._num_sent += len(self._token_ids)
        self._token_ids, self._unsent_text = [], ""
        return progress

    async def _write(self, context: Context, response: pb.GenerateResponse) -> None:
        try:
            async with asyncio.timeout(self._config.write_timeout_s):
                await context.write(response)
        except TimeoutError:
            message = f"the client has not read for {self._config.write_timeout_s:g} s"
            await self._cut_off(context, Fail(self._request.request_id, "RESOURCE_EXHAUSTED", message))

    async def _cut_off(self, context: Context, fail: Fail) -> None:
        """The status waits behind what the client does not read, too: after a while the call goes without one."""
        self._log(fail.code, message=fail.message)
        try:
            async with asyncio.timeout(self._config.write_timeout_s):
                await abort_call(context, fail)
        except TimeoutError:
            raise asyncio.CancelledError from None

    def _log(self, outcome: str, **fields: object) -> None:
        """One line per request: what ended it first."""
        if self._is_logged:
            return
        self._is_logged = True
        ids = {"request_id": self._request.request_id, "client_request_id": self._request.client_request_id}
        log.info("request ended: %s", outcome, extra={"fields": {**ids, "outcome": outcome, **fields}})


async def abort_call(context: Context, fail: Fail) -> NoReturn:
    """gRPC's own key tells clients when to come back."""
    pushback = () if fail.retry_after_s is None else (("grpc-retry-pushback-ms", str(int(1000 * fail.retry_after_s))),)
    await context.abort(grpc.StatusCode[fail.code], fail.message, trailing_metadata=pushback)
