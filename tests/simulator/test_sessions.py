"""More sessions, not faster users: rates come out as asked, and the time between a session's turns stays as it is."""

from __future__ import annotations

import itertools
import pickle
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import replace
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simulator.generator import ANSWER_S_PER_TOKEN, PRESETS, generate, preset, without_longer_contexts
from simulator.limits import num_before
from simulator.offered import WARMUP_S, Compressed, Generated, OfferedLoad, Regrouped
from simulator.requests import SimRequest
from simulator.transforms import at_rate, from_zero, rate_of, with_sessions
from tests.simulator.values import request

RATES = (0.3, 3.0, 24.0)


def by_session(requests: Iterable[SimRequest]) -> dict[str, list[SimRequest]]:
    sessions: dict[str, list[SimRequest]] = defaultdict(list)
    for each in requests:
        sessions[each.session].append(each)
    return sessions


def gaps_of(requests: Iterable[SimRequest]) -> dict[tuple[str, int, int], float]:
    """By session and prompt lengths of two turns one after the other, which only grow."""
    return {
        (name, earlier.num_prompt_tokens, later.num_prompt_tokens): later.at_s - earlier.at_s
        for name, turns in by_session(requests).items()
        for earlier, later in itertools.pairwise(turns)
    }


def trace_of(rng: Random, num_sessions: int) -> tuple[SimRequest, ...]:
    start_s, requests = 0.0, []
    for number in range(num_sessions):
        start_s += rng.expovariate(0.5)
        at_s = start_s
        for turn in range(rng.randint(1, 5)):
            ids = tuple(range(100 * number, 100 * number + turn + 1))
            requests.append(replace(request(at_s, ids), session=f"session {number}"))
            at_s += rng.uniform(1, 30)
    return from_zero(requests)


# --- generated ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("name", PRESETS)
def test_generated_requests_come_at_the_rate_and_users_pause_as_long_as_ever(name: str, rate: float) -> None:
    requests = generate(preset(name), 2000, Random(3), rate)
    assert len(requests) == 2000 and requests[0].at_s == 0
    assert rate_of(requests) == pytest.approx(rate, rel=0.02)
    assert [each.at_s for each in requests] == sorted(each.at_s for each in requests)
    at_own_rate = gaps_of(generate(preset(name), 2000, Random(3)))
    gaps = gaps_of(requests)
    both = gaps.keys() & at_own_rate.keys()
    assert len(both) > 50
    assert all(gaps[key] == pytest.approx(at_own_rate[key]) for key in both)


@pytest.mark.parametrize("rate", [None, *RATES])
def test_no_turn_comes_before_the_expected_end_of_the_last_answer(rate: float | None) -> None:
    for turns in by_session(generate(preset("tool_agent"), 1000, Random(1), rate)).values():
        for earlier, later in itertools.pairwise(turns):
            assert later.at_s - earlier.at_s > ANSWER_S_PER_TOKEN * earlier.num_output_tokens


def test_higher_rates_mean_more_sessions() -> None:
    few, many = (generate(preset("long_sessions"), 1000, Random(0), rate) for rate in (1.0, 10.0))
    assert len(by_session(many)) > 2 * len(by_session(few))
    new = [{name for name in by_session(requests) if "-" not in name} for requests in (few, many)]
    assert len(new[1] & new[0]) > 0.8 * min(map(len, new))  # the same ones begin


def test_sessions_are_under_way_when_the_requests_begin() -> None:
    requests = generate(preset("long_sessions"), 1000, Random(0), 5.0)
    first = requests[:100]
    assert sum(each.num_prompt_tokens for each in first) / 100 == pytest.approx(
        sum(each.num_prompt_tokens for each in requests[-100:]) / 100, rel=0.3
    )


def test_longer_contexts_end_sessions() -> None:
    workload = without_longer_contexts(preset("tool_agent"), 6000)
    requests = generate(workload, 500, Random(0), 4.0)
    assert max(each.num_prompt_tokens for each in requests) <= 6000
    assert rate_of(requests) == pytest.approx(4.0, rel=0.02)


def test_rates_that_cannot_be_are_refused() -> None:
    for rate in (0.0, -1.0, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="rate must be positive, not"):
            generate(preset("tool_agent"), 10, Random(0), rate)


# --- traces ---------------------------------------------------------------------------------------------------------


@settings(max_examples=40)
@given(st.integers(0, 10_000), st.floats(0.05, 50.0), st.one_of(st.none(), st.integers(10, 60)))
def test_sessions_of_a_trace_move_and_their_gaps_stay(seed: int, rate: float, num_requests: int | None) -> None:
    trace = trace_of(Random(seed), 80)
    requests = Regrouped(trace, num_requests).at(rate)
    assert requests[0].at_s == 0
    assert [each.at_s for each in requests] == sorted(each.at_s for each in requests)
    assert 2 <= len(requests) <= (num_requests or len(trace))
    gaps, expected = gaps_of(requests), gaps_of(trace)
    assert all(gaps[key] == pytest.approx(expected[key]) for key in gaps)


@pytest.mark.parametrize("rate", RATES)
def test_a_trace_comes_at_the_rate(rate: float) -> None:
    trace = trace_of(Random(5), 1500)
    assert rate_of(Regrouped(trace, warmup_s=0.0).at(rate)) == pytest.approx(rate, rel=0.01)
    some = Regrouped(trace, 800, warmup_s=0.0).at(rate)
    assert len(some) == 800 and rate_of(some) == pytest.approx(rate, rel=0.02)


def test_a_trace_is_served_to_its_last_new_session_only() -> None:
    """Beyond it the mix would be of old sessions."""
    trace = trace_of(Random(5), 400)
    requests = Regrouped(trace).at(20.0)
    sessions = list(by_session(trace))
    last = max(sessions.index(each.session) for each in requests)
    assert last == 399 and requests[-1].session == sessions[399]
    assert sessions.index(requests[0].session) <= 100  # a quarter began before


def test_sessions_that_begin_at_once_have_no_rate() -> None:
    load = Regrouped(tuple(replace(request(0.0, (number,)), session=str(number)) for number in range(8)))
    with pytest.raises(ValueError, match="8 sessions that begin at once cannot be moved to 2 requests/s"):
        load.at(2.0)


def test_sessions_are_told_by_what_prompts_extend() -> None:
    requests = [
        request(0, (1, 2)),
        request(1, (1, 3)),  # another session: block 1 is everybody's
        request(2, (1, 2, 4, 5)),  # goes on with the first
        request(3, (1, 2, 4, 6), num_missing=1),  # its last block is not full: extends only (1, 2)
        request(4, (1, 2, 4, 5, 7)),
        request(5, (1,)),
        request(6, (1, 8)),
        replace(request(7, (9, 10)), session="known"),
        request(8, (9, 10, 11)),
    ]
    sessions = [each.session for each in with_sessions(requests)]
    first = sessions[0]
    assert [index for index, session in enumerate(sessions) if session == first] == [0, 2, 3, 4]
    assert len({sessions[index] for index in (1, 5, 6)} | {first}) == 4
    assert sessions[7] == sessions[8] == "known"


def test_sessions_of_generated_requests_are_found_again() -> None:
    requests = generate(preset("long_sessions"), 1500, Random(0), 2.0)
    found = with_sessions(replace(each, session="") for each in requests)
    pairs = {(told.session, known.session) for told, known in zip(found, requests, strict=True)}
    assert len(pairs) == len({told for told, _ in pairs})  # never two in one
    assert len(pairs) < 1.2 * len({known for _, known in pairs})  # a first turn may say no more than the shared prefix


# --- loads ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "load",
    [
        Compressed(trace_of(Random(2), 60)),
        Regrouped(trace_of(Random(2), 60)),
        Generated(preset("tool_agent"), 50, Random, "7"),
    ],
    ids=lambda load: type(load).__name__,
)
def test_equal_rates_give_equal_requests_in_every_process(load: OfferedLoad) -> None:
    copy: OfferedLoad = pickle.loads(pickle.dumps(load))
    assert copy.own == load.own and copy.at(2.0) == load.at(2.0) != load.at(2.5)
    assert load.own[0].at_s == load.at(2.0)[0].at_s == 0


def test_a_generated_load_is_what_is_generated() -> None:
    load = Generated(preset("tool_agent"), 50, Random, "7", cut=3000, warmup_s=0.0)
    plain = generate(preset("tool_agent"), 50, Random("7"), 6.0)
    assert [each.at_s for each in load.at(6.0)] == [each.at_s for each in plain]
    assert max(each.num_prompt_tokens for each in load.at(6.0)) == 3000
    assert len(load.own) == 50


@pytest.mark.parametrize("rate", [2.0, 6.0])
@pytest.mark.parametrize(
    "load",
    [Generated(preset("tool_agent"), 600, Random, "7"), Regrouped(trace_of(Random(5), 900), 600)],
    ids=lambda load: type(load).__name__,
)
def test_the_rate_is_that_of_what_comes_after_the_warm_up(load: OfferedLoad, rate: float) -> None:
    requests = load.at(rate)
    num_warmup = num_before(requests, WARMUP_S)
    assert rate_of(requests[num_warmup:]) == pytest.approx(rate, rel=0.02)
    assert 0 < num_warmup < 500 < len(requests) <= 600


def test_a_compressed_load_moves_all_alike() -> None:
    trace = trace_of(Random(2), 60)
    assert Compressed(trace).at(4.0) == at_rate(trace, 4.0)
