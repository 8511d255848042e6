"""One answer over HTTP: server-sent events, or one body. Decides when the status goes out: with the first part, so that
a call which fails before it gets the status of its failure."""

from __future__ import annotations

import json
from dataclasses import dataclass

from starlette.types import Send

from router.events import Fail
from router.openai.answers import Envelope, Json, Shape, Usage, account_body
from router.openai.errors import ApiError, of_fail
from router.parts import Part


@dataclass(frozen=True, slots=True)
class AnswerOptions:
    is_streamed: bool
    usage_with_every_chunk: bool
    usage_at_the_end: bool
    has_account: bool
    n: int  # choices of each prompt


class HttpAnswer:
    """Invariant: the status has been sent exactly if `has_started`, the last byte exactly if `_has_ended`.

    Parts of several prompts come through it: `for_prompt` is the wire of one of them."""

    def __init__(self, send: Send, envelope: Envelope, shape: Shape, options: AnswerOptions) -> None:
        self.has_started = False
        self._has_ended = False
        self._send = send
        self._envelope = envelope
        self._shape = shape
        self._options = options
        self._usage = Usage()
        self._ends: dict[int, Part] = {}  # by choice
        self._seen: set[int] = set()

    def for_prompt(self, prompt_index: int) -> PromptWire:
        return PromptWire(self, prompt_index)

    async def take(self, prompt_index: int, part: Part) -> None:
        index = prompt_index * self._options.n + part.request.choice_index
        self._usage.note(prompt_index, index, part)
        if part.end is not None:
            self._ends[index] = part
        if self._options.is_streamed:
            is_first = index not in self._seen
            self._seen.add(index)
            usage = {"usage": self._usage.body()} if self._options.usage_with_every_chunk else {}
            await self._event([self._shape.chunk(index, part, is_first)], **usage)

    async def finish(self) -> None:
        """Every choice has ended."""
        ends = [self._ends[index] for index in sorted(self._ends)]
        account: Json = {}
        if self._options.has_account:
            account = account_body([part.end.account for part in ends if part.end is not None])
        if not self._options.is_streamed:
            choices = [self._shape.whole(index, part) for index, part in enumerate(ends)]
            body = self._envelope.around(self._shape.kind, choices, usage=self._usage.body(), **account)
            await self._whole(200, body)
            return
        if self._options.usage_at_the_end or account:
            usage = {"usage": self._usage.body()} if self._options.usage_at_the_end else {}
            await self._event([], **usage, **account)
        await self._bytes(b"data: [DONE]\n\n", more=False)

    async def fail(self, error: ApiError) -> None:
        """Behind a stream that has begun, the error is its last event, and no [DONE] follows. Of several prompts that
        fail, the first one says so."""
        if self._has_ended:
            return
        if self.has_started:
            await self._bytes(_event(error.body), more=False)
        else:
            await self._whole(error.status, error.body, error.headers)

    async def _event(self, choices: list[Json], **more: Json) -> None:
        if not self.has_started:
            await self._start(200, {"Content-Type": "text/event-stream; charset=utf-8", "Cache-Control": "no-cache"})
        await self._bytes(_event(self._envelope.around(self._shape.chunk_kind, choices, **more)), more=True)

    async def _whole(self, status: int, body: Json, headers: dict[str, str] | None = None) -> None:
        content = json.dumps(body, ensure_ascii=False).encode()
        about = {"Content-Type": "application/json", "Content-Length": str(len(content))}
        await self._start(status, about | (headers or {}))
        await self._bytes(content, more=False)

    async def _start(self, status: int, headers: dict[str, str]) -> None:
        self.has_started = True
        headers |= {"X-Request-Id": self._envelope.id}
        encoded = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
        await self._send({"type": "http.response.start", "status": status, "headers": encoded})

    async def _bytes(self, content: bytes, more: bool) -> None:
        self._has_ended = not more
        await self._send({"type": "http.response.body", "body": content, "more_body": more})


@dataclass(frozen=True, slots=True)
class PromptWire:
    """A call_writer.Wire: what one of the prompts of a call is answered through."""

    answer: HttpAnswer
    prompt_index: int

    async def send(self, part: Part) -> None:
        await self.answer.take(self.prompt_index, part)

    async def send_failure(self, fail: Fail) -> None:
        await self.answer.fail(of_fail(fail))


def _event(body: Json) -> bytes:
    return b"data: " + json.dumps(body, ensure_ascii=False).encode() + b"\n\n"
