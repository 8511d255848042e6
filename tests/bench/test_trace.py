"""How a trace is replayed: speed, scale, ends, and prompts that share what the trace says."""

from __future__ import annotations

import json
from random import Random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.load.trace import replayed
from bench.load.wording import Lexicon, traced_prompt
from simulator.traces import Trace, parse_trace

LEXICON = Lexicon(tuple(range(1000)))


def line(at_ms: object = 0, num_input: object = 600, num_output: object = 7, hash_ids: object = (1, 2)) -> str:
    record = {"timestamp": at_ms, "input_length": num_input, "output_length": num_output, "hash_ids": hash_ids}
    return json.dumps(record) + "\n"


def as_sent(trace: Trace, **changes: Any) -> tuple[Any, ...]:
    settings: dict[str, Any] = {"speed": 1.0, "scale": 1.0, "duration_s": None, "num_requests": None}
    return replayed(trace, **{**settings, **changes})


def test_speed_scale_and_ends() -> None:
    trace = parse_trace([line(), line(4000), line(8000)])
    sent = as_sent(trace, speed=2.0, scale=0.125)
    assert [request.at_s for request in sent] == [0.0, 2.0, 4.0]
    assert (sent[0].num_prompt_tokens, sent[0].block_tokens, sent[0].num_output_tokens) == (75, 64, 1)
    assert len(as_sent(trace, speed=2.0, duration_s=4.0)) == 2
    assert len(as_sent(trace, num_requests=1)) == 1


@pytest.mark.parametrize("name", ["speed", "scale", "duration_s", "num_requests"])
def test_settings_that_cannot_be_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="must be positive, not 0"):
        as_sent(parse_trace([line()]), **{name: 0})


@given(
    st.lists(st.integers(0, 3), min_size=1, max_size=4),
    st.lists(st.integers(0, 3), min_size=1, max_size=4),
    st.integers(1, 512),
    st.sampled_from([1.0, 0.25, 1 / 512]),
)
def test_prompts_are_equal_exactly_as_far_as_their_hash_ids(
    left: list[int], right: list[int], num_last: int, scale: float
) -> None:
    lines = [line(0, 512 * (len(ids) - 1) + num_last, 1, ids) for ids in (left, right)]
    requests = as_sent(parse_trace(lines), scale=scale)
    prompts = [traced_prompt(LEXICON, Random, 0, request) for request in requests]
    assert [len(prompt) for prompt in prompts] == [request.num_prompt_tokens for request in requests]
    num_shared_blocks = next((i for i, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), None)
    num_alike = min(map(len, prompts))
    if num_shared_blocks is not None:
        num_alike = min(num_alike, num_shared_blocks * requests[0].block_tokens)
    assert prompts[0][:num_alike] == prompts[1][:num_alike]
    if num_shared_blocks is not None and scale == 1.0 and min(map(len, prompts)) > num_alike + 20:
        assert prompts[0][num_alike:] != prompts[1][num_alike:]
