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
        super().__init__(f"{field}: {message}, got {value!r}")
        self.field = field
        self.value = value


@dataclass(frozen=True, slots=True)
class PublicRequest:
    """One call of Generate as the client sent it; None: not given."""

    request_id: str = ""
    text: str | None = None
    input_ids: Sequence[int] | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    seed: int | None = None
    max_tokens: int | None = None
    stop_token_ids: tuple[int, ...] = ()
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False


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
    _check_stop(request.stop, config)
    check_token_ids("sampling_params.stop_token_ids", request.stop_token_ids, limits.vocab_size)
    if request.input_ids is not None:
        check_token_ids("tokenized.input_ids", request.input_ids, limits.vocab_size)
    elif request.text is None:
        raise InvalidArgument("input", None, "either text or tokenized must be set")


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
    return SamplingParams(
        temperature=1.0 if request.temperature is None else request.temperature,
        top_p=1.0 if request.top_p is None else request.top_p,
        top_k=0 if request.top_k is None else request.top_k,
        seed=draw_seed() if request.seed is None else request.seed,
        max_tokens=_max_tokens(request, len(prompt_token_ids), limits),
        stop_token_ids=tuple(dict.fromkeys(stop_token_ids)),
    )


def _max_tokens(request: PublicRequest, num_prompt_tokens: int, limits: Limits) -> int:
    field = "text" if request.input_ids is None else "tokenized.input_ids"
    if num_prompt_tokens == 0:
        raise InvalidArgument(field, num_prompt_tokens, "the prompt must have at least one token")
    if num_prompt_tokens >= limits.max_model_len:
        raise InvalidArgument(
            field, num_prompt_tokens, f"the prompt must have fewer tokens than max_model_len {limits.max_model_len}"
        )
    if num_prompt_tokens >= limits.max_kv_tokens:
        message = f"the prompt must have fewer tokens than a worker's KV pool holds, {limits.max_kv_tokens}"
        raise InvalidArgument(field, num_prompt_tokens, message)
    num_left = min(limits.max_model_len, limits.max_kv_tokens) - num_prompt_tokens
    if request.max_tokens is None:
        return num_left
    if not 1 <= request.max_tokens <= num_left:
        message = f"must be in [1, {num_left}] after a prompt of {num_prompt_tokens} tokens"
        raise InvalidArgument("sampling_params.max_tokens", request.max_tokens, message)
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


def _check_stop(stop: tuple[str, ...], config: RouterConfig) -> None:
    if len(stop) > config.max_stop_strings:
        raise InvalidArgument("sampling_params.stop", len(stop), f"must have at most {config.max_stop_strings} strings")
    for index, text in enumerate(stop):
        if not text:
            raise InvalidArgument(f"sampling_params.stop[{index}]", text, "must not be empty")
        if len(text) > config.max_stop_len:
            message = f"must have at most {config.max_stop_len} characters"
            raise InvalidArgument(f"sampling_params.stop[{index}]", len(text), message)
