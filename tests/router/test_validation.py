from __future__ import annotations

import math
from array import array
from dataclasses import replace

import pytest

from router.config import RouterConfig
from router.validation import InvalidArgument, Limits, PublicRequest, check_request, to_sampling_params

CONFIG = RouterConfig()
LIMITS = Limits(max_model_len=100, max_kv_tokens=80, vocab_size=50, eos_token_ids=(2, 3))
GOOD = PublicRequest(input_ids=[1, 2, 3])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"input_ids": None}, "input: one of text, tokenized and chat must be set, got None"),
        ({"temperature": math.nan}, "sampling_params.temperature: must be finite and at least 0, got nan"),
        ({"temperature": math.inf}, "sampling_params.temperature: must be finite and at least 0, got inf"),
        ({"temperature": -0.5}, "sampling_params.temperature: must be finite and at least 0, got -0.5"),
        ({"top_p": 0.0}, "sampling_params.top_p: must be in (0, 1], got 0.0"),
        ({"top_p": 1.5}, "sampling_params.top_p: must be in (0, 1], got 1.5"),
        ({"top_p": math.nan}, "sampling_params.top_p: must be in (0, 1], got nan"),
        ({"top_k": -1}, "sampling_params.top_k: must be at least 0, got -1"),
        ({"max_tokens": 0}, "sampling_params.max_tokens: must be at least 1, got 0"),
        ({"input_ids": [1, 49, 50, 51]}, "tokenized.input_ids[2]: must be a token id in [0, 50), got 50"),
        ({"stop_token_ids": (7, 99)}, "sampling_params.stop_token_ids[1]: must be a token id in [0, 50), got 99"),
        ({"stop": ("a", "")}, "sampling_params.stop[1]: must not be empty, got ''"),
        ({"stop": ("x",) * 17}, "sampling_params.stop: must have at most 16 strings, got 17"),
        ({"stop": ("x" * 257,)}, "sampling_params.stop[0]: must have at most 256 characters, got 257"),
        ({"min_p": 1.5}, "sampling_params.min_p: must be in [0, 1], got 1.5"),
        ({"min_p": math.nan}, "sampling_params.min_p: must be in [0, 1], got nan"),
        ({"repetition_penalty": 0.0}, "sampling_params.repetition_penalty: must be finite and above 0, got 0.0"),
        ({"repetition_penalty": math.inf}, "sampling_params.repetition_penalty: must be finite and above 0, got inf"),
        ({"presence_penalty": -2.5}, "sampling_params.presence_penalty: must be in [-2, 2], got -2.5"),
        ({"frequency_penalty": 3.0}, "sampling_params.frequency_penalty: must be in [-2, 2], got 3.0"),
        ({"logit_bias": ((4, 101.0),)}, "sampling_params.logit_bias[4]: must be in [-100, 100], got 101.0"),
        ({"logit_bias": ((50, 1.0),)}, "sampling_params.logit_bias[0]: must be a token id in [0, 50), got 50"),
        ({"n": 0}, "sampling_params.n: must be in [1, 16], got 0"),
        ({"n": 17}, "sampling_params.n: must be in [1, 16], got 17"),
        ({"logprobs": 21}, "sampling_params.logprobs: must be in [0, 20], got 21"),
        ({"prompt_logprobs": 0}, "sampling_params.prompt_logprobs: is not supported yet, got 0"),
        ({"output_token_ids": [1], "n": 2}, "sampling_params.n: must be 1 where output_token_ids is set, got 2"),
        ({"output_token_ids": [1, -1]}, "output_token_ids[1]: must be a token id in [0, 50), got -1"),
        ({"request_id": "r" * 129}, "request_id: must have at most 128 characters, got 129"),
    ],
)
def test_refused_before_the_prompt_is_read(fields: dict[str, object], message: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        check_request(replace(GOOD, **fields), LIMITS, CONFIG)  # type: ignore[arg-type]
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("num_prompt_tokens", "max_tokens", "limits", "message"),
    [
        (0, None, LIMITS, "tokenized.input_ids: the prompt must have at least one token, got 0"),
        (
            100,
            None,
            LIMITS,
            "tokenized.input_ids: the prompt must have fewer tokens than max_model_len 100, got 100",
        ),
        (
            80,
            None,
            LIMITS,
            "tokenized.input_ids: the prompt must have fewer tokens than a worker's KV pool holds, 80, got 80",
        ),
        (70, 11, LIMITS, "sampling_params.max_tokens: must be in [1, 10] after a prompt of 70 tokens, got 11"),
    ],
)
def test_refused_for_its_length(num_prompt_tokens: int, max_tokens: int | None, limits: Limits, message: str) -> None:
    request = replace(GOOD, max_tokens=max_tokens)
    with pytest.raises(InvalidArgument) as caught:
        to_sampling_params(request, array("i", [1] * num_prompt_tokens), limits, draw_seed=lambda: 0)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"min_tokens": 6}, "sampling_params.min_tokens: must be at most max_tokens 5, got 6"),
        ({"output_token_ids": [9] * 5}, "output_token_ids: must have fewer tokens than max_tokens 5, got 5"),
        ({"output_token_ids": [9, 3, 9]}, "output_token_ids[1]: the output had ended here, with a stop token, got 3"),
    ],
)
def test_refused_beside_max_tokens(fields: dict[str, object], message: str) -> None:
    request = replace(GOOD, max_tokens=5, **fields)  # type: ignore[arg-type]
    with pytest.raises(InvalidArgument) as caught:
        to_sampling_params(request, array("i", [1]), LIMITS, draw_seed=lambda: 0)
    assert str(caught.value) == message


def test_every_field_reaches_the_workers() -> None:
    fields = {
        "min_p": 0.25,
        "repetition_penalty": 1.5,
        "presence_penalty": -1.0,
        "frequency_penalty": 2.0,
        "logit_bias": ((4, -100.0), (7, 3.0)),
        "min_tokens": 3,
    }
    request = replace(GOOD, logprobs=0, **fields)  # type: ignore[arg-type]
    check_request(request, LIMITS, CONFIG)
    params = to_sampling_params(request, array("i", [1]), LIMITS, draw_seed=lambda: 0)
    assert {name: getattr(params, name) for name in fields} == fields
    assert params.num_logprobs == 0


def test_defaults() -> None:
    check_request(GOOD, LIMITS, CONFIG)
    params = to_sampling_params(GOOD, array("i", [1, 2, 3]), LIMITS, draw_seed=lambda: 42)
    assert (params.temperature, params.top_p, params.top_k, params.seed) == (1.0, 1.0, 0, 42)
    assert params.max_tokens == 77  # what the smaller of context and KV pool leaves
    assert params.stop_token_ids == (2, 3)


def test_what_is_given_is_kept() -> None:
    request = replace(GOOD, temperature=0.0, top_p=0.5, top_k=7, seed=-5, max_tokens=9, stop_token_ids=(2, 9))
    check_request(request, LIMITS, CONFIG)
    params = to_sampling_params(request, array("i", [1]), LIMITS, draw_seed=lambda: 42)
    assert (params.temperature, params.top_p, params.top_k, params.seed, params.max_tokens) == (0.0, 0.5, 7, -5, 9)
    assert params.stop_token_ids == (2, 9, 3)


def test_ignore_eos_leaves_the_callers_own_stop_tokens() -> None:
    request = replace(GOOD, ignore_eos=True, stop_token_ids=(9,))
    assert to_sampling_params(request, array("i", [1]), LIMITS, lambda: 0).stop_token_ids == (9,)


def test_a_prompt_just_below_every_limit_is_taken() -> None:
    assert to_sampling_params(GOOD, array("i", [1] * 79), LIMITS, lambda: 0).max_tokens == 1


@pytest.mark.parametrize(
    "fields", [{"key_depth_blocks": 0}, {"block_size": 100}, {"lease_s": 0.2}, {"max_attempts": 0}]
)
def test_a_config_that_cannot_work_is_refused(fields: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(fields))):
        RouterConfig(**fields)  # type: ignore[arg-type]
