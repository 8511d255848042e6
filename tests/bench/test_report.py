"""Figures from outcomes: percentiles, the four latencies, goodput, and what is said about doubtful ones."""

from __future__ import annotations

import statistics
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.load.outcome import Outcome, Slo
from bench.load.report import LevelReport, level_report, percentile

SLO = Slo(ttft_s=1.0, tpot_s=0.1)
GOOD = Outcome(
    due_at=1.0,
    sent_at=1.01,
    ended_at=2.0,
    text_at=(1.5, 1.6, 1.9),
    last_at=1.9,
    num_prompt_tokens=100,
    num_output_tokens=5,
    num_cached_tokens=0,
)
FAILED = Outcome(due_at=2.0, sent_at=2.0, ended_at=90.0, error="timeout", error_detail="no end within 88 s")


def report_of(outcomes: list[Outcome], **settings: Any) -> LevelReport:
    return level_report("rate 1", 1.0, outcomes, SLO, **{"offered_s": 10.0, **settings})


@given(st.lists(st.floats(-1e6, 1e6), min_size=2), st.integers(1, 99))
def test_percentiles_agree_with_the_standard_library(values: list[float], percent: int) -> None:
    expected = statistics.quantiles(values, n=100, method="inclusive")[percent - 1]
    assert percentile(values, percent) == pytest.approx(expected, abs=1e-6)


def test_percentile_of_few() -> None:
    assert percentile([3.0], 99) == 3.0
    assert percentile([2.0, 1.0], 0) == 1.0 and percentile([2.0, 1.0], 100) == 2.0
    with pytest.raises(ValueError, match="no values"):
        percentile([], 50)


def test_latencies_count_from_when_the_request_was_due() -> None:
    assert GOOD.ttft_s == pytest.approx(0.5)
    assert GOOD.e2e_s == pytest.approx(1.0)
    assert GOOD.tpot_s == pytest.approx(0.4 / 4)  # five tokens in three chunks
    assert GOOD.itls_s == pytest.approx([0.1, 0.3])
    assert GOOD.lateness_s == pytest.approx(0.01)


def test_a_single_token_has_no_tpot() -> None:
    single = replace(GOOD, text_at=(1.5,), last_at=1.5, num_output_tokens=1)
    assert single.tpot_s is None and single.meets(SLO)


def test_an_answer_without_text_came_at_its_end() -> None:
    silent = replace(GOOD, text_at=())
    assert silent.ttft_s == pytest.approx(0.9) and silent.tpot_s == 0.0


@pytest.mark.parametrize(
    ("outcome", "meets"),
    [
        (GOOD, True),
        (replace(GOOD, due_at=0.4), False),  # TTFT 1.1 s
        (replace(GOOD, last_at=2.0), False),  # TPOT 125 ms
        (FAILED, False),
        (replace(GOOD, error="cut"), False),
    ],
)
def test_goodput_takes_both_slos_and_a_success(outcome: Outcome, meets: bool) -> None:
    assert outcome.meets(SLO) is meets
    assert report_of([outcome]).goodput_requests_per_s == pytest.approx(0.1 if meets else 0)


def test_a_hung_request_does_not_slow_the_others_down() -> None:
    report = report_of([GOOD, replace(GOOD, due_at=0.0), FAILED])
    assert report.elapsed_s == 10.0
    assert (report.num_sent, report.num_ok, report.num_in_slo) == (3, 2, 1)
    assert (report.requests_per_s, report.output_tokens_per_s) == (0.2, 1.0)
    assert report.errors == {"timeout": 1} and report.error_example == "no end within 88 s"


def test_the_drain_of_late_successes_counts() -> None:
    assert report_of([replace(GOOD, ended_at=40.0)]).elapsed_s == 40.0


def test_nothing_measured_is_none() -> None:
    report = report_of([FAILED])
    assert report.ttft_s is report.tpot_s is report.itl_s is report.e2e_s is report.num_prompt_tokens_mean is None
    assert report.requests_per_s == report.goodput_requests_per_s == 0.0
    assert report_of([], offered_s=0.0).requests_per_s == 0.0


@pytest.mark.parametrize(
    ("outcome", "settings", "note"),
    [
        (replace(GOOD, sent_at=1.5), {}, "the generator itself lagged"),
        (GOOD, {"loop_lags_s": [0.001] * 10 + [0.5] * 10}, "the generator itself lagged"),
        (replace(GOOD, num_output_tokens=None), {}, "counted as chunks"),
        (replace(GOOD, num_cached_tokens=60), {"num_shared_tokens": 32}, "take another --seed"),
    ],
)
def test_doubts_are_noted(outcome: Outcome, settings: dict[str, Any], note: str) -> None:
    (said,) = report_of([outcome], **settings).notes
    assert note in said


@pytest.mark.parametrize("num_shared_tokens", [64, None])
def test_expected_cache_hits_and_small_lags_are_not_doubts(num_shared_tokens: int | None) -> None:
    cached = replace(GOOD, num_cached_tokens=64)
    assert report_of([cached], num_shared_tokens=num_shared_tokens, loop_lags_s=[0.001]).notes == ()


def test_chunks_are_counted_where_the_server_does_not() -> None:
    assert report_of([replace(GOOD, num_output_tokens=None)]).num_output_tokens_mean == 3
