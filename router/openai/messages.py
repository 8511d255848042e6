"""The bodies of OpenAI's requests, and what the router makes of them. Decides which of OpenAI's fields are served, and
names the one that is not; limits on values are validation.py's, the same as for gRPC."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StrictBool, StrictFloat, StrictInt, StrictStr

from router.validation import ChatMessage, InvalidArgument, PublicRequest

MAX_CHOICES = 128  # of one call: its prompts times n
DEFAULT_MAX_TOKENS = 16  # of a completion, as the API has it; a chat's is what the context leaves

TokenId = Annotated[int, Field(strict=True, ge=0, lt=2**31)]
Number = StrictFloat | StrictInt
Count = Annotated[int, Field(strict=True, ge=0, lt=2**31)]


def _as_tuple(stop: object) -> object:
    return (stop,) if isinstance(stop, str) else () if stop is None else stop


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class StreamOptions(_Strict):
    include_usage: StrictBool = False
    continuous_usage_stats: StrictBool = False  # usage so far with every chunk
    include_obfuscation: StrictBool = False  # taken and not needed: no chunk is padded


class ResponseFormat(_Strict):
    type: Literal["text"] = "text"


class _Sampled(_Strict):
    """What both kinds of request have in common. None: not given."""

    model: StrictStr | None = None
    temperature: Number | None = None
    top_p: Number | None = None
    n: Count | None = None
    seed: Annotated[int, Field(strict=True, ge=-(2**63), lt=2**63)] | None = None
    stop: Annotated[tuple[StrictStr, ...], BeforeValidator(_as_tuple)] = ()
    presence_penalty: Number | None = None
    frequency_penalty: Number | None = None
    logit_bias: dict[StrictStr, Number] | None = None
    max_tokens: Count | None = None
    stream: StrictBool | None = None
    stream_options: StreamOptions | None = None
    user: StrictStr | None = None  # of the caller's own book-keeping, as are the next ones
    metadata: dict[StrictStr, StrictStr] | None = None
    store: Literal[False] | None = None
    service_tier: Literal["auto", "default"] | None = None
    # Not OpenAI's
    request_id: StrictStr = ""
    top_k: Annotated[int, Field(strict=True, ge=-1, lt=2**31)] | None = None
    min_p: Number | None = None
    repetition_penalty: Number | None = None
    min_tokens: Count = 0
    ignore_eos: StrictBool = False
    stop_token_ids: tuple[TokenId, ...] = ()
    include_stop_str_in_output: StrictBool = False
    priority: Annotated[int, Field(strict=True, ge=-(2**31), lt=2**31)] = 0
    include_account: StrictBool = False  # what the request cost and where it ran, with the end of the answer

    @property
    def usage_with_every_chunk(self) -> bool:
        return bool(self.stream_options and self.stream_options.continuous_usage_stats)

    @property
    def usage_at_the_end(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    def _shared(self) -> dict[str, Any]:
        """Fields of a PublicRequest."""
        return {
            "request_id": self.request_id,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": None if self.top_k is None else max(0, self.top_k),  # -1 is another way to say off
            "seed": self.seed,
            "stop_token_ids": self.stop_token_ids,
            "stop": self.stop,
            "ignore_eos": self.ignore_eos,
            "min_p": self.min_p,
            "repetition_penalty": self.repetition_penalty,
            "presence_penalty": self.presence_penalty,
            "frequency_penalty": self.frequency_penalty,
            "logit_bias": _logit_bias(self.logit_bias or {}),
            "min_tokens": self.min_tokens,
            "include_stop": self.include_stop_str_in_output,
            "n": 1 if self.n is None else self.n,
            "priority": self.priority,
        }


def _logit_bias(bias: dict[str, float]) -> tuple[tuple[int, float], ...]:
    for token_id in bias:
        if not (token_id.isascii() and token_id.isdigit() and len(token_id) <= 10):
            raise InvalidArgument("logit_bias", token_id, "keys must be token ids")
    return tuple(sorted((int(token_id), value) for token_id, value in bias.items()))


class CompletionRequest(_Sampled):
    prompt: StrictStr | tuple[StrictStr, ...] | tuple[TokenId, ...] | tuple[tuple[TokenId, ...], ...]
    logprobs: Count | None = None
    echo: Literal[False] | None = None
    suffix: None = None
    best_of: Count | None = None  # refused below unless it is n

    def public_requests(self) -> list[PublicRequest]:
        """One for each prompt."""
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise InvalidArgument("best_of", self.best_of, f"must be n, {self.n or 1}, or not set")
        fields = self._shared() | {
            "max_tokens": DEFAULT_MAX_TOKENS if self.max_tokens is None else self.max_tokens,
            "logprobs": self.logprobs,
        }
        prompts = self._prompts()
        _check_choices(len(prompts), fields["n"])
        if len(prompts) > 1 and self.request_id:
            raise InvalidArgument("request_id", self.request_id, "must not be set with several prompts")
        return [PublicRequest(**_input(prompt), **fields) for prompt in prompts]

    def _prompts(self) -> list[str | Sequence[int]]:
        """A text, or the token ids of one, or several of either."""
        prompt = self.prompt
        if isinstance(prompt, str):
            return [prompt]
        token_ids = [part for part in prompt if isinstance(part, int)]
        if token_ids or not prompt:
            return [token_ids]
        return [part for part in prompt if not isinstance(part, int)]


def _input(prompt: str | Sequence[int]) -> dict[str, Any]:
    return {"text": prompt} if isinstance(prompt, str) else {"input_ids": prompt}


class TextPart(_Strict):
    type: Literal["text"]
    text: StrictStr


class Message(_Strict):
    role: StrictStr
    content: StrictStr | tuple[TextPart, ...]
    name: StrictStr | None = None  # taken, but no template here shows it
    refusal: None = None
    tool_call_id: StrictStr | None = None

    def plain(self) -> ChatMessage:
        content = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        # What the API calls a developer's message is what templates call a system's.
        return ChatMessage("system" if self.role == "developer" else self.role, content)


class ChatRequest(_Sampled):
    messages: tuple[Message, ...]
    logprobs: StrictBool | None = None
    top_logprobs: Count | None = None
    max_completion_tokens: Count | None = None
    response_format: ResponseFormat | None = None
    modalities: tuple[Literal["text"], ...] | None = None
    tools: tuple[()] | None = None
    tool_choice: Literal["none"] | None = None
    parallel_tool_calls: StrictBool | None = None

    def public_requests(self) -> list[PublicRequest]:
        if self.top_logprobs is not None and not self.logprobs:
            raise InvalidArgument("top_logprobs", self.top_logprobs, "needs logprobs true")
        max_tokens = self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens
        fields = self._shared() | {
            "max_tokens": max_tokens,
            "logprobs": (self.top_logprobs or 0) if self.logprobs else None,
        }
        _check_choices(1, fields["n"])
        return [PublicRequest(messages=tuple(message.plain() for message in self.messages), **fields)]


class TokenizeRequest(_Strict):
    model: StrictStr | None = None
    prompt: StrictStr | None = None
    messages: tuple[Message, ...] | None = None

    def public_request(self) -> PublicRequest:
        if (self.prompt is None) == (self.messages is None):
            raise InvalidArgument("prompt", self.prompt, "exactly one of prompt and messages must be set")
        if self.messages is None:
            return PublicRequest(text=self.prompt)
        return PublicRequest(messages=tuple(message.plain() for message in self.messages))


def _check_choices(num_prompts: int, n: int) -> None:
    if num_prompts * n > MAX_CHOICES:
        raise InvalidArgument("n", n, f"prompts times n must be at most {MAX_CHOICES}, with {num_prompts} prompts")
