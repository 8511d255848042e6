"""Which public requests are refused, and how a good one's defaults are filled in. Knows no stubs and no tokenizer: the
front door hands in plain values."""

from __future__ import annotations

import math
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from protos.types import SamplingParams
from router.config import RouterConfig


class InvalidArgument(ValueError):
    """Names the field and the offending value."""

    def __init__(self, field: str, value: object, message: str) -> None:
        self.field = field
        self.value = value
        self.problem = f"{message}, got {value!r}"
        super().__init__(f"{field}: {self.problem}")


class ContextExceeded(InvalidArgument):
    """Prompt and output together do not fit."""


@dataclass(frozen=True, slots=True)
class ChatMessage:
    role: str
    content: str


@dataclass(frozen=True, slots=True)
class PublicRequest:
    """One call of Generate as the client sent it; None: not given."""

    request_id: str = ""
    text: str | None = None
    input_ids: Sequence[int] | None = None
    messages: tuple[ChatMessage, ...] | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    seed: int | None = None
    max_tokens: int | None = None
    stop_token_ids: tuple[int, ...] = ()
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: tuple[tuple[int, float], ...] = ()
    min_tokens: int = 0
    include_stop: bool = False
    n: int = 1
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    priority: int = 0
    output_token_ids: Sequence[int] = ()  # that the caller has already


@dataclass(frozen=True, slots=True)
class Limits:
    """What the served model and the workers allow."""

    max_model_len: int  # tokens, prompt and output
    max_kv_tokens: int  # that the smallest worker's KV pool holds
    vocab_size: int
    eos_token_ids: tuple[int, ...]


def check_request(request: PublicRequest, limits: Limits, config: RouterConfig) -> None:
    """All that can be refused before the prompt is tokenized."""
    if len(request.request_id) > config.max_request_id_len:
        raise InvalidArgument(
            "request_id", len(request.request_id), f"must have at most {config.max_request_id_len} characters"
        )
    _check_sampling(request)
    _check_penalties(request)
    _check_counts(request, config)
    _check_stop(request.stop, config)
    check_token_ids("sampling_params.stop_token_ids", request.stop_token_ids, limits.vocab_size)
    check_token_ids("sampling_params.logit_bias", [token_id for token_id, _ in request.logit_bias], limits.vocab_size)
    check_token_ids("output_token_ids", request.output_token_ids, limits.vocab_size)
    if request.input_ids is not None:
        check_token_ids("tokenized.input_ids", request.input_ids, limits.vocab_size)
    elif request.text is None and request.messages is None:
        raise InvalidArgument("input", None, "one of text, tokenized and chat must be set")


def check_token_ids(field: str, token_ids: Sequence[int], vocab_size: int) -> None:
    if not token_ids or (max(token_ids) < vocab_size and min(token_ids) >= 0):
        return
    index = next(i for i, token_id in enumerate(token_ids) if not 0 <= token_id < vocab_size)
    raise InvalidArgument(f"{field}[{index}]", token_ids[index], f"must be a token id in [0, {vocab_size})")


def to_sampling_params(
    request: PublicRequest, prompt_token_ids: array[int], limits: Limits, draw_seed: Callable[[], int]
) -> SamplingParams:
    """Check the prompt's length against the limits, and fill in the defaults."""
    stop_token_ids = request.stop_token_ids if request.ignore_eos else request.stop_token_ids + limits.eos_token_ids
    max_tokens = _max_tokens(request, len(prompt_token_ids), limits)
    _check_lengths(request, max_tokens, stop_token_ids)
    return SamplingParams(
        temperature=1.0 if request.temperature is None else request.temperature,
        top_p=1.0 if request.top_p is None else request.top_p,
        top_k=0 if request.top_k is None else request.top_k,
        seed=draw_seed() if request.seed is None else request.seed,
        max_tokens=max_tokens,
        stop_token_ids=tuple(dict.fromkeys(stop_token_ids)),
        min_p=request.min_p or 0.0,
        repetition_penalty=1.0 if request.repetition_penalty is None else request.repetition_penalty,
        presence_penalty=request.presence_penalty or 0.0,
        frequency_penalty=request.frequency_penalty or 0.0,
        logit_bias=request.logit_bias,
        min_tokens=request.min_tokens,
        num_logprobs=request.logprobs,
    )


def _max_tokens(request: PublicRequest, num_prompt_tokens: int, limits: Limits) -> int:
    field = "text" if request.text is not None else "chat" if request.messages is not None else "tokenized.input_ids"
    if num_prompt_tokens == 0:
        raise InvalidArgument(field, num_prompt_tokens, "the prompt must have at least one token")
    if num_prompt_tokens >= limits.max_model_len:
        raise ContextExceeded(
            field, num_prompt_tokens, f"the prompt must have fewer tokens than max_model_len {limits.max_model_len}"
        )
    if num_prompt_tokens >= limits.max_kv_tokens:
        message = f"the prompt must have fewer tokens than a worker's KV pool holds, {limits.max_kv_tokens}"
        raise ContextExceeded(field, num_prompt_tokens, message)
    num_left = min(limits.max_model_len, limits.max_kv_tokens) - num_prompt_tokens
    if request.max_tokens is None:
        return num_left
    if not 1 <= request.max_tokens <= num_left:
        message = f"must be in [1, {num_left}] after a prompt of {num_prompt_tokens} tokens"
        raise ContextExceeded("sampling_params.max_tokens", request.max_tokens, message)
    return request.max_tokens


def _check_sampling(request: PublicRequest) -> None:
    temperature, top_p, top_k = request.temperature, request.top_p, request.top_k
    if temperature is not None and not (math.isfinite(temperature) and temperature >= 0):
        raise InvalidArgument("sampling_params.temperature", temperature, "must be finite and at least 0")
    if top_p is not None and not 0 < top_p <= 1:  # refuses NaN too
        raise InvalidArgument("sampling_params.top_p", top_p, "must be in (0, 1]")
    if top_k is not None and top_k < 0:
        raise InvalidArgument("sampling_params.top_k", top_k, "must be at least 0")
    if request.max_tokens == 0:
        raise InvalidArgument("sampling_params.max_tokens", 0, "must be at least 1")


def _check_penalties(request: PublicRequest) -> None:
    repetition_penalty = request.repetition_penalty
    if repetition_penalty is not None and not (math.isfinite(repetition_penalty) and repetition_penalty > 0):
        raise InvalidArgument("sampling_params.repetition_penalty", repetition_penalty, "must be finite and above 0")
    _check_range("sampling_params.min_p", request.min_p, 0, 1)
    _check_range("sampling_params.presence_penalty", request.presence_penalty, -2, 2)
    _check_range("sampling_params.frequency_penalty", request.frequency_penalty, -2, 2)
    for token_id, bias in request.logit_bias:
        _check_range(f"sampling_params.logit_bias[{token_id}]", bias, -100, 100)


def _check_counts(request: PublicRequest, config: RouterConfig) -> None:
    _check_range("sampling_params.n", request.n, 1, config.max_n)
    _check_range("sampling_params.logprobs", request.logprobs, 0, config.max_logprobs)
    if request.prompt_logprobs is not None:
        raise InvalidArgument("sampling_params.prompt_logprobs", request.prompt_logprobs, "is not supported yet")
    if request.output_token_ids and request.n > 1:
        raise InvalidArgument("sampling_params.n", request.n, "must be 1 where output_token_ids is set")


def _check_range(field: str, value: float | None, low: int, high: int) -> None:
    if value is not None and not low <= value <= high:  # refuses NaN too
        raise InvalidArgument(field, value, f"must be in [{low}, {high}]")


def _check_lengths(request: PublicRequest, max_tokens: int, stop_token_ids: Sequence[int]) -> None:
    output_token_ids, min_tokens = request.output_token_ids, request.min_tokens
    if min_tokens > max_tokens:
        raise InvalidArgument("sampling_params.min_tokens", min_tokens, f"must be at most max_tokens {max_tokens}")
    if len(output_token_ids) >= max_tokens:
        message = f"must have fewer tokens than max_tokens {max_tokens}"
        raise InvalidArgument("output_token_ids", len(output_token_ids), message)
    for index in range(min_tokens, len(output_token_ids)):
        if output_token_ids[index] in stop_token_ids:
            message = "the output had ended here, with a stop token"
            raise InvalidArgument(f"output_token_ids[{index}]", output_token_ids[index], message)


def _check_stop(stop: tuple[str, ...], config: RouterConfig) -> None:
    if len(stop) > config.max_stop_strings:
        raise InvalidArgument("sampling_params.stop", len(stop), f"must have at most {config.max_stop_strings} strings")
    for index, text in enumerate(stop):
        if not text:
            raise InvalidArgument(f"sampling_params.stop[{index}]", text, "must not be empty")
        if len(text) > config.max_stop_len:
            message = f"must have at most {config.max_stop_len} characters"
            raise InvalidArgument(f"sampling_params.stop[{index}]", len(text), message)
