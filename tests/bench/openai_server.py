"""A small real server of the OpenAI API: answers after known delays, and fails on purpose, as it is told. Its tokenizer
makes one token of a word; what a prompt says is counted, not understood."""

from __future__ import annotations

import asyncio
import json
import re
import socket
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

FIRST_S, NEXT_S = 0.05, 0.01  # to the first token, and between two
NUM_TEMPLATE_TOKENS = 3  # around each chat message
PIECE = re.compile(r" ?[^ ]+")


@dataclass
class OpenAIServer:
    """What was asked of it, in order. `takes` are the optional things that it offers."""

    failure: str = ""  # of all requests but the first num_good
    num_good: int = 0
    takes: frozenset[str] = frozenset({"usage", "ignore_eos", "tokenize", "ids"})
    token: str | None = None
    bodies: list[dict[str, Any]] = field(default_factory=list)
    num_running: int = 0
    most_running: int = 0
    port: int = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def app(self) -> Starlette:
        return Starlette(
            routes=[
                Route("/v1/models", self.models),
                Route("/tokenize", self.tokenize, methods=["POST"]),
                Route("/v1/chat/completions", self.generate, methods=["POST"]),
                Route("/v1/completions", self.generate, methods=["POST"]),
            ]
        )

    async def models(self, _: Request) -> Response:
        return JSONResponse({"data": [{"id": "good"}]})

    async def tokenize(self, request: Request) -> Response:
        if "tokenize" not in self.takes:
            return JSONResponse({"error": "no such route"}, 404)
        return JSONResponse({"tokens": tokens_of((await request.json())["prompt"])})

    async def generate(self, request: Request) -> Response:
        if self.token is not None and request.headers.get("authorization") != f"Bearer {self.token}":
            return JSONResponse({"error": {"message": "who are you?"}}, 401)
        body = await request.json()
        refused = {"stream_options": "usage", "ignore_eos": "ignore_eos"}
        if any(name in body and thing not in self.takes for name, thing in refused.items()):
            return JSONResponse({"error": {"message": "unknown field"}}, 400)
        if isinstance(body.get("prompt"), list) and "ids" not in self.takes:
            return JSONResponse({"error": {"message": "prompt must be text"}}, 400)
        self.bodies.append(body)
        failure = self.failure if len(self.bodies) > self.num_good else ""
        if failure.startswith("http_"):
            return JSONResponse({"error": {"message": "on purpose"}}, int(failure.removeprefix("http_")))
        return StreamingResponse(self.stream(body, failure), media_type="text/event-stream")

    async def stream(self, body: dict[str, Any], failure: str) -> AsyncIterator[bytes]:
        self.num_running += 1
        self.most_running = max(self.most_running, self.num_running)
        try:
            async for data in self.chunks(body, failure):
                yield data
        finally:
            self.num_running -= 1

    async def chunks(self, body: dict[str, Any], failure: str) -> AsyncIterator[bytes]:
        is_chat = "messages" in body
        if is_chat:
            yield event({"choices": [{"delta": {"role": "assistant", "content": ""}}]})
        if failure == "hang":
            await asyncio.sleep(60)
        for index in range(body["max_tokens"]):
            await asyncio.sleep(NEXT_S if index else FIRST_S)
            if failure == "cut" and index == 1:
                raise ConnectionAbortedError("on purpose")
            if failure == "half" and index == 1:
                return
            if failure == "malformed" and index == 1:
                yield b'data: {"choices": [}\n\n'
            if failure == "in_stream" and index == 1:
                yield event({"error": {"message": "on purpose", "code": 500}})
            finish = "length" if index + 1 == body["max_tokens"] else None
            choice: dict[str, Any] = {"delta": {"content": "é "}} if is_chat else {"text": "é "}
            whole = event({"choices": [choice | {"finish_reason": finish}]})
            yield whole[:20]  # an event in two pieces
            yield whole[20:]
        if "stream_options" in body:
            usage = {"prompt_tokens": num_prompt_tokens(body), "completion_tokens": body["max_tokens"]}
            yield event({"choices": [], "usage": usage | {"prompt_tokens_details": {"cached_tokens": 0}}})
        yield b"data: [DONE]\n\n"


def event(content: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(content, ensure_ascii=False).encode() + b"\n\n"


def tokens_of(text: str) -> list[int]:
    """A first token that every text has, then one per word."""
    return [0, *(1 + sum(map(ord, piece)) for piece in PIECE.findall(text))]


def num_prompt_tokens(body: dict[str, Any]) -> int:
    prompt = body["prompt"] if "prompt" in body else body["messages"][0]["content"]
    if isinstance(prompt, list):
        return len(prompt)
    return len(tokens_of(prompt)) + (NUM_TEMPLATE_TOKENS if "messages" in body else 0)


@contextmanager
def serving(server: OpenAIServer) -> Iterator[OpenAIServer]:
    """In a thread of its own, so that its delays do not depend on the client's event loop."""
    # asyncio turns Nagle's algorithm off only where a socket names its protocol; with it, answers wait 40 ms
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP) as listener:
        listener.bind(("127.0.0.1", 0))
        server.port = listener.getsockname()[1]
        config = uvicorn.Config(
            server.app(), log_level="critical", lifespan="off", timeout_graceful_shutdown=1, ws="none"
        )
        uv = uvicorn.Server(config)
        thread = threading.Thread(target=uv.run, args=([listener],), daemon=True)
        thread.start()
        try:
            yield server
        finally:
            uv.should_exit = True
            thread.join(10)
            assert not thread.is_alive()
