"""Sends requests over HTTP and notes when what came back. Decides nothing about what to ask, or when."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import httpx2

from bench.load.outcome import Outcome
from bench.load.plan import Target
from bench.load.sse import EventParser
from bench.load.wire import PATHS, Answer, StreamError

MAX_ERROR_CHARS = 200


class LoadClient:
    """Invariant: every request ends within timeout_s of being sent, as an Outcome; none raises."""

    def __init__(self, http: httpx2.AsyncClient, target: Target) -> None:
        self._http = http
        self._path = PATHS[target.endpoint]
        self._timeout_s = target.timeout_s
        self._started_at = time.monotonic()

    def restart_clock(self) -> None:
        """Instants count from here."""
        self._started_at = time.monotonic()

    @property
    def now(self) -> float:
        return time.monotonic() - self._started_at

    async def ask(self, body: bytes, due_at: float | None = None) -> Outcome:
        """Without due_at, the request is due when it is sent."""
        sent_at = self.now
        answer = Answer()
        outcome = Outcome(sent_at if due_at is None else due_at, sent_at, sent_at)
        try:
            async with asyncio.timeout(self._timeout_s):
                await self._stream(body, answer)
            answer.check_complete()
        except TimeoutError:
            return self._failed(outcome, "timeout", f"no end within {self._timeout_s:g} s")
        except StreamError as error:
            return self._failed(outcome, error.kind, str(error))
        except UnicodeDecodeError as error:
            return self._failed(outcome, "malformed", f"not UTF-8: {error}")
        except httpx2.TransportError as error:
            kind = "cut" if answer.has_choice else "connection"
            return self._failed(outcome, kind, f"{type(error).__name__}: {error}")
        num_prompt, num_output, num_cached = answer.account()
        return replace(
            outcome,
            ended_at=self.now,
            text_at=tuple(answer.text_at),
            last_at=answer.last_at,
            num_prompt_tokens=num_prompt,
            num_output_tokens=num_output,
            num_cached_tokens=num_cached,
        )

    def _failed(self, outcome: Outcome, kind: str, detail: str) -> Outcome:
        return replace(outcome, ended_at=self.now, error=kind, error_detail=detail[:MAX_ERROR_CHARS])

    async def _stream(self, body: bytes, answer: Answer) -> None:
        parser = EventParser()
        async with self._http.stream("POST", self._path, content=body) as response:
            if response.status_code != 200:
                text = (await response.aread()).decode(errors="replace")
                raise StreamError(f"http_{response.status_code}", text)
            async for data in response.aiter_raw():
                at = self.now
                for event in parser.feed(data):
                    answer.take(event, at)
            for event in parser.close():
                answer.take(event, self.now)

    async def get_json(self, path: str) -> Any:
        return await self._json("GET", path, None)

    async def post_json(self, path: str, content: dict[str, Any]) -> Any:
        return await self._json("POST", path, content)

    async def _json(self, method: str, path: str, content: dict[str, Any] | None) -> Any:
        """ValueError where there is no JSON answer."""
        try:
            async with asyncio.timeout(self._timeout_s):
                response = await self._http.request(method, path, json=content)
        except TimeoutError as error:
            raise ValueError(f"{method} {path}: no answer within {self._timeout_s:g} s") from error
        except httpx2.TransportError as error:
            raise ValueError(f"{method} {path}: {type(error).__name__}: {error}") from error
        if response.status_code != 200:
            raise ValueError(f"{method} {path}: HTTP {response.status_code}: {response.text[:MAX_ERROR_CHARS]}")
        return response.json()


@contextlib.asynccontextmanager
async def connected(target: Target) -> AsyncIterator[LoadClient]:
    """A client with as many connections as it takes. What waits has its deadline in LoadClient, over the whole answer,
    not per read."""
    headers = {"content-type": "application/json", "accept-encoding": "identity"}
    if target.token:
        headers["authorization"] = f"Bearer {target.token}"
    limits = httpx2.Limits(max_connections=None, max_keepalive_connections=None)
    async with httpx2.AsyncClient(base_url=target.base_url, headers=headers, timeout=None, limits=limits) as http:
        yield LoadClient(http, target)
