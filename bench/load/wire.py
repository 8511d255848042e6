"""The OpenAI HTTP API as far as a load generator speaks it: what a request says, and what the chunks of its answer
mean. Values only; client.py does the talking."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bench.load.outcome import Outcome
    from bench.load.plan import Endpoint
    from bench.load.wording import Prompt

PATHS: dict[Endpoint, str] = {"chat": "/v1/chat/completions", "completions": "/v1/completions"}
TEXT_FIELDS = ("content", "reasoning_content", "reasoning")


class StreamError(Exception):
    """The answer cannot be used; its kind is a key of the report's errors."""

    def __init__(self, kind: str, detail: str) -> None:
        super().__init__(detail)
        self.kind = kind


@dataclass(frozen=True, slots=True)
class Dialect:
    """Fields beyond the least common ones that the server takes."""

    model: str
    endpoint: Endpoint
    takes_usage: bool = True  # stream_options.include_usage
    takes_ignore_eos: bool = True

    def body(self, prompt: Prompt, num_output_tokens: int) -> bytes:
        content: dict[str, Any] = {"prompt": prompt}
        if self.endpoint == "chat":
            content = {"messages": [{"role": "user", "content": prompt}]}
        body = {"model": self.model, **content, "max_tokens": num_output_tokens, "temperature": 0.0, "stream": True}
        if self.takes_usage:
            body["stream_options"] = {"include_usage": True}
        if self.takes_ignore_eos:
            body["ignore_eos"] = True
        return json.dumps(body).encode()


@dataclass
class Answer:
    """What the chunks so far came to. Invariant: text_at is in order and no later than last_at."""

    text_at: list[float] = field(default_factory=list)
    last_at: float = 0.0
    has_choice: bool = False
    is_finished: bool = False  # a finish_reason, or [DONE]
    usage: dict[str, Any] = field(default_factory=dict)

    def take(self, data: str, at: float) -> None:
        """One event's data, come at an instant. StreamError where it is an error, or is not what was promised."""
        if data == "[DONE]":
            self.is_finished = True
            return
        chunk = _object_of(data)
        if error := chunk.get("error"):
            raise StreamError("in_stream", json.dumps(error)[:200])
        if isinstance(usage := chunk.get("usage"), dict):
            self.usage = usage
        match chunk.get("choices"):
            case [{} as choice, *_]:
                self._take_choice(choice, at)
            case [] | None:
                pass
            case choices:
                raise StreamError("malformed", f"choices is {choices!r}"[:200])

    def _take_choice(self, choice: dict[str, Any], at: float) -> None:
        self.has_choice, self.last_at = True, at
        delta = choice.get("delta")
        texts = [choice.get("text"), *(delta.get(name) for name in TEXT_FIELDS)] if delta else [choice.get("text")]
        if any(texts) or (delta and delta.get("tool_calls")):
            self.text_at.append(at)
        if choice.get("finish_reason") is not None:
            self.is_finished = True

    def check_complete(self) -> None:
        """StreamError where the stream ended without an end of its answer."""
        if not self.is_finished:
            raise StreamError("cut", "the stream ended without a finish_reason or [DONE]")
        if not self.has_choice:
            raise StreamError("malformed", "the stream held no choice")

    def account(self) -> tuple[int | None, int | None, int | None]:
        """Prompt, output and cached tokens as the server counted them; None where it did not."""
        details = self.usage.get("prompt_tokens_details")
        cached = details.get("cached_tokens") if isinstance(details, dict) else None
        return _count(self.usage.get("prompt_tokens")), _count(self.usage.get("completion_tokens")), _count(cached)


def _object_of(data: str) -> dict[str, Any]:
    try:
        chunk = json.loads(data)
    except json.JSONDecodeError as error:
        raise StreamError("malformed", f"not JSON: {data[:100]!r}") from error
    if not isinstance(chunk, dict):
        raise StreamError("malformed", f"not an object: {data[:100]!r}")
    return chunk


def _count(value: object) -> int | None:
    return value if type(value) is int else None


def is_refusal(outcome: Outcome) -> bool:
    """The server did not like the request's fields; it may take another form."""
    return outcome.error in ("http_400", "http_422")
