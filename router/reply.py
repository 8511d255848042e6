"""The answer to one choice of a call: text from tokens, in parts or one whole, the last word, the log line. What a part
looks like on the wire is the writer's affair."""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import asdict
from typing import NoReturn

from protos.types import FinishReason, Logprobs
from router.account import RequestAccount
from router.call_writer import CallWriter
from router.client_call import ClientCall
from router.config import RouterConfig
from router.driver import Driver
from router.events import Arrived, Deliver, Fail, StopMatched
from router.parts import End, Part
from router.recent_requests import EndedRequest, RecentRequests
from router.text_stream import TextStream

log = logging.getLogger("twinring.router")


class Reply:
    """Invariant: tokens [0, _num_sent) and their text have been written; the ones up to _text.num_tokens wait in
    _token_ids and _unsent_text, for the next chunk or the last word."""

    def __init__(
        self,
        config: RouterConfig,
        driver: Driver,
        recent: RecentRequests,
        arrived: Arrived,
        text: TextStream,
        stream: bool,
        writer: CallWriter,
    ) -> None:
        """text: has taken the output that the caller has already."""
        self._config = config
        self._driver = driver
        self._recent = recent
        self._request = arrived.request
        self._text = text
        self._stream = stream
        self._writer = writer
        self._token_ids: list[int] = []
        self._logprobs: list[Logprobs] = []
        self._unsent_text = ""
        self._num_sent = self._num_given_tokens = text.num_tokens
        self._is_noted = False

    @property
    def num_output_tokens(self) -> int:
        """That have come for this call, whether or not they could be sent."""
        return self._text.num_tokens - self._num_given_tokens

    async def run(self, call: ClientCall) -> None:
        try:
            is_open = True
            while is_open:
                news = await call.take()  # no deadline: the last word or the client's cancellation ends the wait
                is_open = isinstance(news, Deliver) and news.finish_reason is None
                await (self._deliver(news) if isinstance(news, Deliver) else self._cut_off(news))
        except asyncio.CancelledError:
            self._note_end("CANCELLED")
            raise

    async def _deliver(self, news: Deliver) -> None:
        self._take(news)
        if news.finish_reason is not None:
            await self._finish(news, news.finish_reason)
        elif self._stream and self._text.matched_stop is None:
            await self._write(self._part(news))

    async def _finish(self, news: Deliver, finish_reason: FinishReason) -> None:
        assert news.account is not None
        matched: str | int | None = self._text.matched_stop
        if matched is not None:
            finish_reason = FinishReason.STOP  # wherever the workers had gone on to
        elif finish_reason is FinishReason.STOP:
            matched = news.token_ids[-1]
        part = self._part(news, End(finish_reason, matched, news.account))
        await self._write(part)
        self._note_end(finish_reason.value, news.account)

    def _take(self, news: Deliver) -> None:
        if self._text.matched_stop is not None:
            return  # the output has ended before these
        before = self._text.num_tokens
        # The token that stops an output comes with the last word, as its last.
        num_text_tokens = len(news.token_ids) - (news.finish_reason is FinishReason.STOP)
        self._unsent_text += self._text.push(news.token_ids[:num_text_tokens])
        if self._text.matched_stop is None and num_text_tokens < len(news.token_ids):
            self._unsent_text += self._text.push_stop_token(news.token_ids[-1])
        num_taken = self._text.num_tokens - before
        self._token_ids += news.token_ids[:num_taken]
        self._logprobs += news.logprobs[:num_taken]
        if self._text.matched_stop is not None:
            self._driver.feed(StopMatched(self._request.request_id))
        elif news.finish_reason is not None:
            self._unsent_text += self._text.flush()

    def _part(self, news: Deliver, end: End | None = None) -> Part:
        """What has not been sent, which is sent with this."""
        part = Part(
            self._request,
            self._num_sent,
            self._token_ids,
            self._unsent_text,
            news.num_cached_tokens,
            self._logprobs,
            end,
        )
        self._num_sent += len(self._token_ids)
        self._token_ids, self._logprobs, self._unsent_text = [], [], ""
        return part

    async def _write(self, part: Part) -> None:
        try:
            await self._writer.write(part)
        except TimeoutError:
            message = f"the client has not read for {self._config.write_timeout_s:g} s"
            await self._cut_off(Fail(self._request.request_id, "RESOURCE_EXHAUSTED", message))

    async def _cut_off(self, fail: Fail) -> NoReturn:
        self._note_end(fail.code, message=fail.message)
        await self._writer.cut_off(fail)

    def _note_end(self, outcome: str, account: RequestAccount | None = None, message: str = "") -> None:
        """Once per choice, for what ended it first: a log line, and a place among the recent requests."""
        if self._is_noted:
            return
        self._is_noted = True
        request, num_output_tokens = self._request, self.num_output_tokens
        ended = EndedRequest(
            request.request_id, time.time(), outcome, request.num_prompt_tokens, num_output_tokens, account
        )
        self._recent.note(ended)
        fields = {
            "request_id": request.request_id,
            "client_request_id": request.client_request_id,
            "tenant": request.tenant,
            "choice_index": request.choice_index,
            "outcome": outcome,
            "num_prompt_tokens": request.num_prompt_tokens,
            "num_output_tokens": num_output_tokens,
            **({"message": message} if message else {}),
            **({} if account is None else asdict(account)),
        }
        log.info("request ended: %s", outcome, extra={"fields": fields})
