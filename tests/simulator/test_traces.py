"""Traces: what is taken as a request, what is left out and why, and what is made of the requests afterwards."""

from __future__ import annotations

import json
from array import array
from pathlib import Path
from random import Random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from simulator.requests import SimRequest, prompt_token_ids
from simulator.traces import BadLine, parse_trace, read_trace
from simulator.transforms import (
    at_rate,
    ideal_cached_tokens,
    ideal_hit_rate,
    jittered,
    rate_of,
    renumbered,
    truncated,
    without_longer,
)

AZURE_HEADER = "TIMESTAMP,ContextTokens,GeneratedTokens\n"
PUBLIC = Path(__file__).resolve().parents[3] / "shared" / "data" / "traces"  # beside the checkout


def line(at_ms: object = 0, num_input: object = 600, num_output: object = 7, hash_ids: object = (1, 2)) -> str:
    record = {"timestamp": at_ms, "input_length": num_input, "output_length": num_output, "hash_ids": hash_ids}
    return json.dumps(record) + "\n"


def request(hash_ids: tuple[int, ...], num_last: int = 512, at_s: float = 0.0) -> SimRequest:
    return SimRequest(at_s, 1, hash_ids, 512 * (len(hash_ids) - 1) + num_last)


def log_line(**fields: Any) -> str:
    record = {
        "time": "2026-03-01T12:00:10.000+00:00",
        "level": "info",
        "logger": "twinring.router",
        "message": "request ended: length",
        "num_prompt_tokens": 700,
        "num_output_tokens": 5,
        "e2e_s": 4.0,
    }
    return json.dumps(record | fields) + "\n"


# --- Mooncake -------------------------------------------------------------------------------------------------------


def test_lines_come_in_order_of_time_from_zero() -> None:
    trace = parse_trace([line(3000, 512, 9, [4]), "\n", line(1000)])
    assert [(request.at_s, request.num_prompt_tokens, request.num_output_tokens) for request in trace.requests] == [
        (0.0, 600, 7),
        (2.0, 512, 9),
    ]
    assert trace.requests[0].hash_ids == (1, 2)
    assert trace.notes() == []


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (line()[:40], "not JSON"),
        ("[1, 2]", "not an object"),
        (line(at_ms=None), "timestamp is None"),
        (line(at_ms=-1), "timestamp is -1"),
        (line(num_input="600"), "input_length is '600'"),
        (line(num_output=True), "output_length is True"),
        (line(num_output=0), "must be positive"),
        (line(num_input=0, hash_ids=[]), "must be positive"),
        (line(hash_ids=[1]), "1 hash_ids for input_length 600"),
        (line(hash_ids=["a", "b"]), "hash_ids is not a list of integers"),
        (line(hash_ids=None), "hash_ids is not a list of integers"),
    ],
)
def test_bad_lines_are_left_out_with_number_and_reason(bad: str, reason: str) -> None:
    trace = parse_trace([line(), bad, line()])
    assert len(trace.requests) == 2
    (bad_line,) = trace.bad_lines
    assert bad_line.number == 2 and reason in bad_line.reason
    assert "1 lines of the trace left out (line 2: " in trace.notes()[0]


def test_many_bad_lines_are_counted() -> None:
    trace = parse_trace([line(), *["{"] * 9])
    assert trace.notes()[0].startswith("9 lines") and trace.notes()[0].count("line ") == 3
    assert trace.bad_lines[-1] == BadLine(10, trace.bad_lines[0].reason)


@pytest.mark.parametrize("lines", [[], ["\n"], ["{"]])
def test_a_trace_without_requests_is_refused(lines: list[str]) -> None:
    with pytest.raises(ValueError, match="no request in the trace"):
        parse_trace(lines)


# --- the other formats ----------------------------------------------------------------------------------------------


def test_azure_lines_share_nothing() -> None:
    lines = ["\n", AZURE_HEADER, "2023-11-16 18:15:50.9951690,600,3\n", "2023-11-16 18:15:46.9951690,600,9\n"]
    trace = parse_trace(lines)
    assert [(r.at_s, r.num_prompt_tokens, r.num_output_tokens) for r in trace.requests] == [(0, 600, 9), (4, 600, 3)]
    assert not set(trace.requests[0].hash_ids) & set(trace.requests[1].hash_ids)
    assert not trace.has_prefixes and "no prefixes" in trace.notes()[0]
    assert ideal_hit_rate(trace.requests) == 0


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        ("2023-11-16 18:15:46,600", "2 fields for 3 columns"),
        ("2023-11-16 18:15:46,600,", "GeneratedTokens is ''"),
        ("2023-11-16 18:15:46,0,4", "ContextTokens is '0'"),
        ("2023-11-16 18:1,600,4", "TIMESTAMP is '2023-11-16 18:1'"),
    ],
)
def test_bad_azure_lines_are_left_out(bad: str, reason: str) -> None:
    trace = parse_trace([AZURE_HEADER, "2023-11-16 18:15:46,600,4\n", bad])
    assert trace.bad_lines == (BadLine(3, reason),)


def test_a_csv_with_other_columns_is_refused() -> None:
    with pytest.raises(ValueError, match="the columns must be TIMESTAMP, ContextTokens, GeneratedTokens"):
        parse_trace(["TIMESTAMP,Tokens\n", "2023-11-16 18:15:46,600\n"])


def test_the_services_own_log_counts_from_arrival() -> None:
    lines = [
        log_line(message="worker prefill-0 joined"),
        log_line(),
        log_line(message="request ended: CANCELLED", time="2026-03-01T12:00:09+00:00", num_output_tokens=0, e2e_s=1.0),
        log_line(num_prompt_tokens=0),
        log_line(e2e_s="soon"),
    ]
    trace = parse_trace(lines)
    assert [(r.at_s, r.num_prompt_tokens, r.num_output_tokens) for r in trace.requests] == [(0, 700, 5), (2, 700, 1)]
    assert [bad.number for bad in trace.bad_lines] == [4, 5]
    assert not trace.has_prefixes


def test_files_may_be_compressed(tmp_path: Path) -> None:
    zstandard = pytest.importorskip("zstandard")
    text = line(0) + "{\n" + line(2000)
    plain, packed = tmp_path / "trace.jsonl", tmp_path / "trace.jsonl.zst"
    plain.write_text(text)
    packed.write_bytes(zstandard.compress(text.encode()))
    assert read_trace(packed) == read_trace(plain)
    assert len(read_trace(packed).requests) == 2


def test_without_zstandard_the_error_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("simulator.traces.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"trace.zst needs zstandard: pip install zstandard, or decompress"):
        read_trace(tmp_path / "trace.zst")


@pytest.mark.parametrize(
    ("name", "num_requests", "rate", "ideal"),
    [
        ("mooncake_conversation.jsonl.zst", 12_031, 3.40, 0.373),
        ("mooncake_synthetic.jsonl.zst", 3_993, 3.91, 0.650),
        ("azure2023_conv.csv.zst", 19_366, 5.53, 0.0),
        ("azure2023_code.csv.zst", 8_819, 2.57, 0.0),
    ],
)
def test_public_traces(name: str, num_requests: int, rate: float, ideal: float) -> None:
    pytest.importorskip("zstandard")
    if not (PUBLIC / name).exists():
        pytest.skip(f"{PUBLIC / name} is not here")
    trace = read_trace(PUBLIC / name)
    assert (len(trace.requests), trace.bad_lines) == (num_requests, ())
    assert rate_of(trace.requests) == pytest.approx(rate, abs=0.005)
    assert ideal_hit_rate(trace.requests) == pytest.approx(ideal, abs=0.001)


# --- what is made of requests ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"at_s": -1.0}, "at_s must be a time from 0 on, not -1"),
        ({"num_output_tokens": 0}, "num_output_tokens must be positive, not 0"),
        ({"hash_ids": (1,)}, "1 hash_ids for 600 tokens"),
    ],
)
def test_requests_that_cannot_be_are_refused(changes: dict[str, Any], message: str) -> None:
    fields = {"at_s": 0.0, "num_output_tokens": 1, "hash_ids": (1, 2), "num_prompt_tokens": 600}
    with pytest.raises(ValueError, match=message):
        SimRequest(**{**fields, **changes})


ids = st.lists(st.integers(0, 3), min_size=1, max_size=4).map(tuple)


@given(ids, ids, st.integers(1, 512))
def test_tokens_are_equal_exactly_as_far_as_ids(left: tuple[int, ...], right: tuple[int, ...], num_last: int) -> None:
    tokens = [prompt_token_ids(request(hash_ids, num_last)) for hash_ids in (left, right)]
    assert [len(t) for t in tokens] == [512 * (len(hash_ids) - 1) + num_last for hash_ids in (left, right)]
    assert all(isinstance(t, array) and t.typecode == "i" for t in tokens)
    for index, (a, b) in enumerate(zip(*tokens, strict=False)):
        assert (a == b) == (left[index // 512] == right[index // 512])


def test_ids_too_large_for_a_token_are_refused_and_renumbered() -> None:
    big = request((2**40, 2**41, 2**40))
    with pytest.raises(ValueError, match=f"hash id {2**40} must lie in"):
        prompt_token_ids(big)
    assert renumbered([big])[0].hash_ids == (0, 1, 0)


@given(st.lists(st.tuples(ids, st.integers(1, 512)), min_size=1, max_size=8))
def test_ideal_hits_are_the_longest_prefix_of_full_blocks_seen_before(prompts: list[tuple[Any, int]]) -> None:
    requests = [request(hash_ids, num_last) for hash_ids, num_last in prompts]
    full = [r.hash_ids[: r.num_prompt_tokens // 512] for r in requests]
    for index, (r, num_cached) in enumerate(zip(requests, ideal_cached_tokens(requests), strict=True)):
        longest = max(
            (n for earlier in full[:index] for n in range(5) if earlier[:n] == full[index][:n] and len(earlier) >= n),
            default=0,
        )
        expected = min(longest, len(full[index]))
        if 512 * expected == r.num_prompt_tokens:
            expected -= 1
        assert num_cached == 512 * expected


def test_jitter_spreads_ticks_over_its_length() -> None:
    ticks = [request((1,), at_s=3.0 * (index // 100)) for index in range(1000)]
    spread = jittered(ticks, 3.0, Random(5))
    assert spread == jittered(ticks, 3.0, Random(5)) != jittered(ticks, 3.0, Random(6))
    assert spread[0].at_s == 0 and [r.at_s for r in spread] == sorted(r.at_s for r in spread)
    per_second = [sum(1 for r in spread if second <= r.at_s < second + 1) for second in range(30)]
    assert min(per_second) > 10
    with pytest.raises(ValueError, match="jitter must not be negative"):
        jittered(ticks, -1.0, Random(5))


def test_long_prompts_are_cut_or_dropped() -> None:
    short, long = request((1,), at_s=4.0), request((2, 3, 4), at_s=1.0)
    assert without_longer([long, short], 600) == (request((1,), at_s=0.0),)
    cut_long, same = truncated([long, short], 600)
    assert same == short
    assert (cut_long.num_prompt_tokens, cut_long.hash_ids) == (600, (2, 3))


def test_a_rate_changes_all_gaps_alike() -> None:
    requests = [request((1,), at_s=at_s) for at_s in (0.0, 1.0, 5.0, 6.0)]
    assert [r.at_s for r in at_rate(requests, 2.0)] == pytest.approx([0.0, 0.25, 1.25, 1.5])
    assert rate_of(at_rate(requests, 7.0)) == pytest.approx(7.0)
    with pytest.raises(ValueError, match="rate must be positive, not 0"):
        at_rate(requests, 0.0)
    with pytest.raises(ValueError, match="all come at once"):
        at_rate(requests[:1], 1.0)
