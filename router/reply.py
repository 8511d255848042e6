"""The answer to one choice of a Generate call: text from tokens, chunks or one whole, the last word, the log line."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import asdict
from typing import NoReturn

from protos import inference_pb2 as pb
from protos.types import FinishReason, Logprobs
from router.call_writer import CallWriter
from router.client_call import ClientCall
from router.config import RouterConfig
from router.driver import Driver
from router.events import Arrived, Deliver, Fail, StopMatched
from router.responses import Progress, chunk_response, complete_response
from router.text_stream import TextStream

log = logging.getLogger("twinring.router")


class Reply:
    """Invariant: tokens [0, _num_sent) and their text have been written; the ones up to _text.num_tokens wait in
    _token_ids and _unsent_text, for the next chunk or the last word."""

    def __init__(
        self,
        config: RouterConfig,
        driver: Driver,
        arrived: Arrived,
        text: TextStream,
        stream: bool,
        writer: CallWriter,
    ) -> None:
        """text: has taken the output that the caller has already."""
        self._config = config
        self._driver = driver
        self._request = arrived.request
        self._text = text
        self._stream = stream
        self._writer = writer
        self._token_ids: list[int] = []
        self._logprobs: list[Logprobs] = []
        self._unsent_text = ""
        self._num_sent = text.num_tokens
        self._is_logged = False

    async def run(self, call: ClientCall) -> None:
        try:
            is_open = True
            while is_open:
                news = await call.take()  # no deadline: the last word or the client's cancellation ends the wait
                is_open = isinstance(news, Deliver) and news.finish_reason is None
                await (self._deliver(news) if isinstance(news, Deliver) else self._cut_off(news))
        except asyncio.CancelledError:
            self._log("CANCELLED")
            raise

    async def _deliver(self, news: Deliver) -> None:
        self._take(news)
        if news.finish_reason is not None:
            await self._finish(news, news.finish_reason)
        elif self._stream and self._text.matched_stop is None:
            await self._write(chunk_response(self._request, self._progress(news)))

    async def _finish(self, news: Deliver, finish_reason: FinishReason) -> None:
        assert news.account is not None
        matched: str | int | None = self._text.matched_stop
        if matched is not None:
            finish_reason = FinishReason.STOP  # wherever the workers had gone on to
        elif finish_reason is FinishReason.STOP:
            matched = news.token_ids[-1]
        progress = self._progress(news)
        await self._write(complete_response(self._request, progress, finish_reason, matched, news.account))
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

    def _progress(self, news: Deliver) -> Progress:
        """What has not been sent, which is sent with this."""
        progress = Progress(
            self._num_sent,
            self._token_ids,
            self._unsent_text,
            self._request.num_prompt_tokens,
            news.num_cached_tokens,
            self._logprobs,
        )
        self._num_sent += len(self._token_ids)
        self._token_ids, self._logprobs, self._unsent_text = [], [], ""
        return progress

    async def _write(self, response: pb.GenerateResponse) -> None:
        try:
            await self._writer.write(response)
        except TimeoutError:
            message = f"the client has not read for {self._config.write_timeout_s:g} s"
            await self._cut_off(Fail(self._request.request_id, "RESOURCE_EXHAUSTED", message))

    async def _cut_off(self, fail: Fail) -> NoReturn:
        self._log(fail.code, message=fail.message)
        await self._writer.cut_off(fail)

    def _log(self, outcome: str, **fields: object) -> None:
        """One line per choice: what ended it first."""
        if self._is_logged:
            return
        self._is_logged = True
        ids: dict[str, object] = {
            "request_id": self._request.request_id,
            "client_request_id": self._request.client_request_id,
        }
        ids["choice_index"] = self._request.choice_index
        log.info("request ended: %s", outcome, extra={"fields": {**ids, "outcome": outcome, **fields}})
