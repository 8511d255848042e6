"""Rates, the search for goodput, the bounds that no placement passes, and what is shown of it all."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protos.cost_model import HARDWARE
from simulator.limits import check_slos, mean_decode_s, mean_prefill_s, reference_of
from simulator.offered import Compressed
from simulator.report import Report, as_json, points_of
from simulator.requests import SimRequest
from simulator.result import Summary
from simulator.run import simulate
from simulator.setup import Setup, default_router
from simulator.sweep import CaseResult, Experiment, Goodput, Variant, bisect, goodput_of, outward, parse_rates

SETUP = Setup(hardware=HARDWARE["8b-h100"], num_prefill=8, num_decode=8)
SUMMARY = Summary(**{field.name: 1 for field in fields(Summary)})


def prompts(*hash_ids: tuple[int, ...], num_output_tokens: int = 1) -> list[SimRequest]:
    return [SimRequest(float(i), num_output_tokens, ids, 512 * len(ids)) for i, ids in enumerate(hash_ids)]


def case(rate: float, attainment: float = 1.0, ring_seed: int = 0, **changes: Any) -> CaseResult:
    return CaseResult("one", rate, ring_seed, replace(SUMMARY, attainment=attainment, **changes), ())


def runner(knee: float, rates: list[float]) -> Callable[[float], CaseResult]:
    """A variant that is good up to its knee; notes the rates it was asked for."""

    def run(rate: float) -> CaseResult:
        rates.append(rate)
        return case(rate, 0.95 if rate <= knee else 0.5)

    return run


# --- searches ---------------------------------------------------------------------------------------------------------


@given(st.floats(0.05, 500), st.floats(0.5, 50))
def test_a_search_from_a_guess_finds_the_knee(knee: float, guess: float) -> None:
    rates: list[float] = []
    found = goodput_of(outward(runner(knee, rates), guess, 0.02))
    assert found.bound == "found"
    assert found.rate <= knee <= found.rate * 1.02 * (1 + 1e-9)
    assert len(rates) == len(set(rates)) <= 25


def test_a_good_guess_takes_few_runs() -> None:
    rates: list[float] = []
    outward(runner(10.1, rates), 10.0, 0.02)
    assert len(rates) <= 4


def test_a_search_without_a_knee_says_so() -> None:
    with pytest.raises(ValueError, match="one: no goodput between 1 and "):
        outward(runner(math.inf, []), 1.0, 0.02)


def test_a_run_is_given_up_once_too_many_have_missed() -> None:
    """Forty long prompts at once on one worker: most of them are late, and the last ones are never looked at."""
    setup = replace(SETUP, num_prefill=1, num_decode=0, num_warmup=2)
    requests = [
        SimRequest(0.02 * index, 1, tuple(range(100 * index, 100 * index + 40)), 20_480) for index in range(400)
    ]
    whole, cut = simulate(setup, requests), simulate(setup, requests, max_missed=20)
    assert len(cut.records) < len(whole.records) == 400
    num_late = sum(record.wait_s > setup.router.ttft_slo_s for record in cut.measured)
    assert num_late > 20
    assert cut.records[0].wait_s == whole.records[0].wait_s
    assert math.isfinite(cut.summary().longest_wait_s)
    assert simulate(setup, requests, max_missed=400).summary() == whole.summary()


# --- rates ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "rates"),
    [
        ("2", (2,)),
        ("4,1,2.5,1", (1, 2.5, 4)),
        ("1..7:2", (1, 3, 5, 7)),
        ("1..8:3", (1, 4, 7)),
        ("0.1..0.3:0.1", (0.1, 0.2, 0.3)),
        ("1..41", (1, 6, 11, 16, 21, 26, 31, 36, 41)),
        ("3..3,9", (3, 9)),
    ],
)
def test_rates_as_written(text: str, rates: tuple[float, ...]) -> None:
    assert parse_rates(text) == rates


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0", "rate must be positive, not '0'"),
        ("-2", "rate must be positive, not '-2'"),
        ("0..4", "rate must be positive, not '0'"),
        ("1..4:0", "rate must be positive, not '0'"),
        ("nan", "rate must be positive, not 'nan'"),
        ("4..1", "'4..1' ends below its beginning"),
        ("1..9:1e-6", "makes 8000001 rates, at most 1000"),
        ("1,x", "rate must be numbers, e.g. 1,2,4 or 1..40:3, not 'x'"),
        ("", "rate must be numbers"),
    ],
)
def test_rates_that_cannot_be(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_rates(text)


# --- goodput --------------------------------------------------------------------------------------------------------


@given(st.floats(1, 40), st.lists(st.floats(0.5, 50), min_size=1, max_size=6, unique=True))
def test_the_search_ends_as_close_to_the_knee_as_asked(knee: float, rates: list[float]) -> None:
    asked: list[float] = []
    known = [runner(knee, [])(rate) for rate in rates]
    cases = known + bisect(runner(knee, asked), known, 0.02)
    goodput = goodput_of(cases)
    if min(rates) > knee:
        assert goodput == Goodput(min(rates), "below") and not asked
    elif max(rates) <= knee:
        assert goodput == Goodput(max(rates), "at least") and not asked
    else:
        assert goodput.bound == "found" and knee / 1.02 <= goodput.rate <= knee
        assert len(asked) <= 9


def test_the_search_goes_above_the_highest_good_rate() -> None:
    """Attainment need not fall evenly."""
    known = [case(1, 0.95), case(2, 0.85), case(4, 0.95), case(8, 0.2)]
    asked: list[float] = []
    found = bisect(runner(5, asked), known, 0.02)
    assert all(4 < rate < 8 for rate in asked)
    assert goodput_of(known + found).rate == pytest.approx(5, rel=0.02)


def test_nine_tenths_is_good() -> None:
    assert goodput_of([case(3, 0.9)]).bound == "at least"
    assert goodput_of([case(3, 0.899)]).bound == "below"


# --- bounds ---------------------------------------------------------------------------------------------------------


def test_reference_of_prefill_counts_what_no_earlier_prompt_had() -> None:
    cost = HARDWARE["8b-h100"].cost
    alone = replace(SETUP, num_decode=0)
    tokens = 16 * 512
    one_step_s = cost.prefill_s([(tokens, 0)])  # 8192 tokens: exactly a step budget
    requests = prompts(tuple(range(16)), tuple(range(16, 32)))
    assert mean_prefill_s(requests, alone) == pytest.approx(one_step_s)
    assert reference_of(requests, alone).rate == pytest.approx(8 / one_step_s)
    assert math.isinf(reference_of(requests, alone).decode_rate)
    half_cached = prompts(tuple(range(16)), (*range(8), *range(50, 58)))
    second_s = cost.prefill_s([(4096, 4096)]) - cost.prefill_base_s / 2  # half a step's base
    assert mean_prefill_s(half_cached, alone) == pytest.approx((one_step_s + second_s) / 2)


def test_reference_of_decode_fills_the_batch_that_slo_and_memory_allow() -> None:
    cost = HARDWARE["8b-h100"].cost
    requests = prompts(tuple(range(8)), tuple(range(8, 16)), num_output_tokens=101)
    context = 4096 + 101 / 2
    loose = replace(SETUP, router=replace(default_router(), tpot_slo_s=10.0))
    num_seqs = 412_000 / context  # memory is what ends the batch
    step_s = cost.decode_base_s + num_seqs * (cost.decode_s_per_seq + cost.decode_s_per_kv_token * context)
    assert mean_decode_s(requests, loose) == pytest.approx(100 * step_s / num_seqs)
    tight = replace(SETUP, router=replace(default_router(), tpot_slo_s=0.007))
    assert mean_decode_s(requests, tight) > 2 * mean_decode_s(requests, loose)
    reference = reference_of(requests, tight)
    assert reference.rate == reference.decode_rate == pytest.approx(8 / mean_decode_s(requests, tight))
    colocated = replace(loose, num_decode=0, router=replace(loose.router, mode="colocated"))
    both_s = mean_prefill_s(requests, colocated) + mean_decode_s(requests, colocated)
    assert reference_of(requests, colocated).rate == pytest.approx(8 / both_s)


def test_slos_that_nothing_can_meet_are_refused() -> None:
    requests = prompts(*((10 * i, *range(10 * i + 1, 10 * i + 10)) for i in range(10)), num_output_tokens=5)
    alone_s = HARDWARE["8b-h100"].cost.prompt_s(5120, 0, 8192)
    check_slos(requests, SETUP, 0.9)
    for ttft_s, tpot_s, message in (
        (alone_s * 0.99, 0.05, r"slo-ttft 0.\d+ s cannot be met: 0% of the requests would meet it alone"),
        (5.0, 0.006, "slo-tpot 0.006 s cannot be met"),
        (0.0, 0.05, "slo-ttft must be positive, not 0"),
        (5.0, -1.0, "slo-tpot must be positive, not -1"),
    ):
        setup = replace(SETUP, router=replace(default_router(), ttft_slo_s=ttft_s, tpot_slo_s=tpot_s))
        with pytest.raises(ValueError, match=message):
            check_slos(requests, setup, 0.9)
    cached = [requests[0]] * 20  # nineteen of twenty can have all but a block from the first
    setup = replace(SETUP, router=replace(default_router(), ttft_slo_s=alone_s * 0.99))
    check_slos(cached, setup, 0.9)


# --- what is shown --------------------------------------------------------------------------------------------------


def report(*cases: CaseResult) -> Report:
    requests = tuple(prompts((1, 2), (1, 3), (1, 2, 4)))
    experiment = Experiment(Compressed(requests), SETUP, (Variant("one", default_router()),), (1.0, 2.0), (0, 1))
    return Report(experiment, "trace", "8b-h100", reference_of(requests, SETUP), cases)


def test_seeds_become_means_but_the_longest_wait() -> None:
    (point,) = points_of([case(1.0, 0.8, 0, longest_wait_s=3.0), case(1.0, 1.0, 1, longest_wait_s=9.0)])
    assert (point.rate, point.longest_wait_s) == (1.0, 9.0)
    assert point.attainment == pytest.approx(0.9)


def test_goodput_is_per_ring_seed_and_its_mean_says_when_it_is_a_bound() -> None:
    shown = report(case(1.0, 1.0, 0), case(2.0, 0.2, 0), case(1.0, 1.0, 1), case(2.0, 1.0, 1))
    assert shown.goodputs("one") == [Goodput(1.0, "found"), Goodput(2.0, "at least")]
    goodput = as_json(shown)["goodput"]["one"]
    assert (goodput["rate"], goodput["bound"]) == (1.5, "at least")


def test_json_has_no_number_that_json_has_not() -> None:
    document = as_json(report(case(1.0, longest_wait_s=math.inf)))
    assert json.loads(json.dumps(document, allow_nan=False)) == document
    assert document["cases"][0]["summary"]["longest_wait_s"] is None
    assert document["reference"]["decode_rate"] is None and document["reference"]["rate"] > 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rates": (1.0, -1.0)}, "rate must be positive, not -1"),
        ({"tolerance": 0.0}, "tolerance must be positive, not 0"),
        ({"ring_seeds": ()}, "ring_seeds must not be empty"),
        ({"variants": (Variant("a", default_router()),) * 2}, "named once, but they are a, a"),
    ],
)
def test_experiments_that_cannot_be(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(report().experiment, **changes)
