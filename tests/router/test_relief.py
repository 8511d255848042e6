"""Who moves where, and that nothing swings back and forth: by example, and on random clusters whose load stays, grows
or ends."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from router.events import MigrationWanted
from router.freeness import DecodeLoad, WorkerLoad
from router.relief import BURST_S, FAILED_PAUSE_S, Relief, ReliefConfig

BLOCK = 4
NUM_BLOCKS = 100
NBYTES = 1000  # of a block
CONFIG = ReliefConfig(
    low_freeness=20.0,
    high_freeness=40.0,
    min_remaining_tokens=8,
    max_migrations=2,
    max_nbytes_per_s=100.0 * NBYTES,
    cooldown_s=5.0,
)


def request(name: str, num_blocks: int = 10, num_remaining_tokens: int = 100, **fields: Any) -> DecodeLoad:
    return DecodeLoad(name, num_blocks, num_remaining_tokens, **fields)


def worker(name: str, *requests: DecodeLoad, **fields: Any) -> WorkerLoad:
    return WorkerLoad(name, NUM_BLOCKS, requests, block_nbytes=NBYTES, **fields)


def full(name: str, num: int = 9, **fields: Any) -> WorkerLoad:
    """9 requests hold 90 blocks: 40 tokens are left, 4.4 for each."""
    return worker(name, *(request(f"{name}{i}", num_blocks=10) for i in range(num)), **fields)


def moves(*loads: WorkerLoad, config: ReliefConfig = CONFIG) -> list[tuple[str, str]]:
    return [(one.request_id, one.to_worker_id) for one in Relief(config, BLOCK).decide(loads, 0.0)]


def freeness(load: WorkerLoad, headroom: float = 0.1) -> float:
    return load.room(headroom).freeness(BLOCK)


# --- freeness -------------------------------------------------------------------------------------------------------


def test_freeness_is_the_steps_until_memory_is_full() -> None:
    load = worker("d", request("a", 20), request("b", 30))
    assert freeness(load) == 50 * BLOCK / 2
    assert freeness(worker("d")) == NUM_BLOCKS * BLOCK, "nothing runs: all of it for the next one"
    assert freeness(replace(load, num_other_blocks=10, num_other_requests=2)) == 40 * BLOCK / 4
    assert freeness(worker("d", request("a", 120))) == -20 * BLOCK, "more is needed than there is: somebody waits"


def test_a_request_of_high_priority_has_headroom() -> None:
    load = worker("d", request("a", 20), request("b", 30, priority=1))
    assert freeness(load, headroom=0.1) == 40 * BLOCK / 2
    twice = worker("d", request("a", 20, priority=2), request("b", 30, priority=1))
    assert freeness(twice, headroom=0.1) == 40 * BLOCK / 2, "once, for all of them"


def test_a_worker_that_is_to_end_has_none() -> None:
    assert freeness(worker("d", is_leaving=True)) == -math.inf


@given(st.lists(st.tuples(st.integers(1, 40), st.sampled_from((0, 1))), min_size=1, max_size=6), st.integers(0, 9))
def test_to_try_a_move_is_to_have_made_it(drawn: list[tuple[int, int]], num_others: int) -> None:
    first, *rest = (request(str(i), blocks, priority=priority) for i, (blocks, priority) in enumerate(drawn))
    before = worker("d", *rest, num_other_blocks=2, num_other_requests=num_others)
    after = replace(before, requests=(first, *rest))
    assert before.room(0.1).beside(first) == after.room(0.1)
    assert after.room(0.1).without(first) == before.room(0.1)


# --- who moves ------------------------------------------------------------------------------------------------------


def test_the_least_free_gives_to_the_most_free_and_says_why() -> None:
    loads = (full("hot"), worker("cool", request("c", 10)), worker("cold"))
    (first, second) = Relief(CONFIG, BLOCK).decide(loads, 0.0)
    assert first == MigrationWanted(
        "hot0", "cold", "hot is full in 4 steps, cold in 400; 10 blocks to move, about 100 tokens to come"
    )
    assert (second.request_id, second.to_worker_id) == ("hot1", "cool"), "360 steps each: cold has one, too, by now"


def test_no_worker_is_given_more_than_it_runs_at_once() -> None:
    one_more = replace(worker("cool", request("c", 10)), max_num_seqs=2)
    assert moves(full("hot"), one_more) == [("hot0", "cool")]
    assert moves(full("hot"), replace(one_more, num_other_requests=1)) == []
    leaving = replace(full("hot"), is_leaving=True)
    assert moves(leaving, replace(one_more, num_other_requests=1)) == [], "it would be refused all the same"


def test_where_a_move_failed_none_is_tried_for_a_while() -> None:
    relief, loads = Relief(CONFIG, BLOCK), (full("hot"), worker("cold"))
    relief.failed("hot", "cold", 0.0)
    assert relief.decide(loads, FAILED_PAUSE_S - 0.1) == []
    assert relief.decide((*loads, worker("other")), FAILED_PAUSE_S - 0.1), "elsewhere"
    fresh = Relief(CONFIG, BLOCK)
    fresh.failed("hot", "cold", 0.0)
    assert fresh.decide(loads, FAILED_PAUSE_S)
    assert relief.decide((replace(loads[0], is_leaving=True), loads[1]), FAILED_PAUSE_S - 0.1), "it cannot wait"


def test_nobody_moves_without_need_or_without_room() -> None:
    assert moves(full("d-0", 6), worker("d-1")) == [], "160 tokens for 6: enough"
    small = worker("d-0", request("small", 1), *full("d-0").requests)
    assert moves(small, full("d-1", 6)) == [], "26 steps are too few to take any, 22 with the small one"
    assert moves(small, full("d-1", 6), config=replace(CONFIG, high_freeness=26.0)) == [("small", "d-1")]
    assert moves(full("d-0")) == []
    assert moves() == []


def test_the_least_urgent_and_shortest_goes_and_none_that_will_soon_end() -> None:
    def hot(*last: DecodeLoad) -> WorkerLoad:
        return worker("hot", request("big", 40), request("urgent", 1, priority=1), *last)

    cold = worker("cold")
    one = replace(CONFIG, max_migrations=1)
    assert moves(hot(request("short", 9), request("long", 50)), cold, config=one) == [("short", "cold")]
    ending = request("ending", 9, num_remaining_tokens=7)
    assert moves(hot(ending, request("long", 50)), cold, config=one) == [("big", "cold")]
    assert moves(hot(request("moving", 59, may_move=False)), cold, config=one) == [("big", "cold")]
    only = worker("hot", request("urgent", 90, priority=1))
    assert moves(only, cold, config=one) == [], "it would have no more room there than it has here"


def test_one_that_does_not_fit_stays() -> None:
    hot = worker("hot", request("b", 40), num_other_blocks=59, num_other_requests=9)
    cool = worker("cool", request("c", 50))  # 200 tokens are left: 20 for two after the 40 blocks
    assert moves(hot, cool) == []
    assert moves(hot, worker("cool", request("c", 49))) == [("b", "cool")]
    alone = worker("hot", request("a", 59), request("b", 40))
    assert moves(alone, worker("cool", request("c", 49))) == [], "a alone would have more room here than both there"


def test_a_long_request_that_waits_makes_others_move_until_it_fits() -> None:
    """60 blocks of it find 50 free ones here, and 70 there in vain: it waits here."""
    waiting = request("waiting", 60, may_move=False)
    here = worker("here", waiting, *(request(f"r{i}", 10) for i in range(5)))
    there = worker("there", *(request(f"t{i}", 6) for i in range(5)))
    found = moves(here, there, config=replace(CONFIG, low_freeness=0.0, high_freeness=8.0))
    assert found == [("r0", "there")], "then 60 are free"


def test_everything_leaves_a_worker_that_is_to_end() -> None:
    leaving = worker("old", request("ending", 2, num_remaining_tokens=1), request("a", 10), is_leaving=True)
    found = Relief(CONFIG, BLOCK).decide((leaving, full("d-0", 6)), 0.0)
    assert [(one.request_id, one.to_worker_id) for one in found] == [("ending", "d-0")], "a would be too much there"
    assert found[0].reason.startswith("old is to end, d-0 in 27;")
    assert moves(leaving, worker("d-1")) == [("ending", "d-1"), ("a", "d-1")]
    assert moves(full("hot"), worker("old", is_leaving=True)) == [], "and nothing goes there"
    only = Relief(CONFIG, BLOCK, only_leaving=True)
    found = only.decide((leaving, full("hot"), worker("d-1")), 0.0)
    assert [(one.request_id, one.to_worker_id) for one in found] == [("ending", "d-1"), ("a", "d-1")]


def test_one_that_cannot_go_after_all_does_not_keep_the_others_of_a_worker_that_is_to_end() -> None:
    leaving = worker("old", *(request(f"r{i}", 2 + i) for i in range(4)), is_leaving=True)
    relief = Relief(CONFIG, BLOCK, only_leaving=True)
    asked = [{one.request_id for one in relief.decide((leaving, worker("d-1")), now)} for now in (0.0, 0.25, 5.0)]
    assert asked == [{"r0", "r1"}, {"r2", "r3"}, {"r0", "r1"}]


def test_where_the_most_free_worker_is_too_small_the_next_one_takes_it() -> None:
    leaving = worker("old", request("long", 30), is_leaving=True)
    small = replace(worker("small"), num_blocks=25)
    large = replace(worker("large", *(request(f"l{i}", 5) for i in range(4))), num_blocks=80)
    assert freeness(small) > freeness(large)
    assert moves(leaving, small, large) == [("long", "large")]


# --- how much at a time ---------------------------------------------------------------------------------------------


def test_no_worker_has_more_than_so_many_migrations() -> None:
    assert len(moves(full("hot"), worker("d-1"), worker("d-2"))) == CONFIG.max_migrations
    assert len(moves(full("hot"), full("hotter"), worker("d-1"))) == CONFIG.max_migrations
    assert len(moves(full("hot", num_migrations=1), worker("d-1"))) == 1
    assert moves(full("hot"), worker("d-1", num_migrations=2), worker("d-2", num_migrations=2)) == []


def test_bytes_are_paid_for_at_the_rate() -> None:
    """10 blocks take 0.1 s at the rate, and one second's worth may come at once."""
    relief = Relief(replace(CONFIG, max_migrations=99, low_freeness=399.0, high_freeness=399.5), BLOCK)
    num_begun = [len(relief.decide((full("hot"), worker("cold")), at)) for at in (0.0, 0.15, 0.2, 6.0)]
    assert num_begun[0] == 0, "cold is no freer afterwards"
    relief = Relief(replace(CONFIG, max_migrations=99, max_nbytes_per_s=25.0 * NBYTES), BLOCK)
    num_begun = [len(relief.decide((full("hot"), worker("cold")), at)) for at in (0.0, 0.1, 0.3, 10.0)]
    assert num_begun == [3, 0, 1, 3]
    relief = Relief(replace(CONFIG, max_migrations=99, max_nbytes_per_s=25.0 * NBYTES), BLOCK)
    assert len(relief.decide((full("hot"), full("hotter", 10), worker("cold")), 0.0)) == 3, "it takes no more"


def test_after_a_move_there_is_a_pause() -> None:
    relief = Relief(CONFIG, BLOCK)
    hot, cold = worker("hot", request("a", 95), request("b", 4)), worker("cold")
    assert [one.request_id for one in relief.decide((hot, cold), 0.0)] == ["b"]
    back = worker("cold", request("b", 4), *full("c").requests), worker("hot")
    assert relief.decide(back, 4.9) == [], "the same two the other way round"
    assert len(Relief(CONFIG, BLOCK).decide(back, 4.9)) == 2
    again = worker("cold", request("b", 4), request("c", 95, num_remaining_tokens=1)), worker("third")
    assert relief.decide(again, 4.9) == [], "the same request"
    assert [one.request_id for one in relief.decide(again, 5.0)] == ["b"]
    assert (relief._moved_at, relief._paired_at) == ({"b": 5.0}, {("cold", "third"): 5.0}), "the rest is forgotten"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"low_freeness": 256.0}, r"low_freeness must be in \[0, high_freeness 256.0\) and both finite, got 256.0"),
        ({"low_freeness": -1.0}, "low_freeness must be in"),
        ({"high_freeness": math.inf}, "low_freeness must be in"),
        ({"priority_headroom": 1.0}, r"priority_headroom must be in \[0, 1\), got 1.0"),
        ({"min_remaining_tokens": 0}, "min_remaining_tokens must be at least 1, got 0"),
        ({"max_migrations": 0}, "max_migrations must be at least 1, got 0"),
        ({"max_nbytes_per_s": 0.0}, "max_nbytes_per_s must be above 0 and finite, got 0.0"),
        ({"cooldown_s": -0.5}, "cooldown_s must be finite and not negative, got -0.5"),
    ],
)
def test_settings_that_cannot_work_are_named(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ReliefConfig(**fields)


# --- random clusters ------------------------------------------------------------------------------------------------

sizes = st.lists(
    st.tuples(st.integers(1, 40), st.integers(1, 200), st.sampled_from((0, 0, 0, 1)), st.booleans()), max_size=8
)
configs = st.builds(
    lambda low, gap, num, rate, cooldown_s: ReliefConfig(
        low_freeness=low,
        high_freeness=low + gap,
        min_remaining_tokens=8,
        max_migrations=num,
        max_nbytes_per_s=rate * NBYTES,
        cooldown_s=cooldown_s,
    ),
    st.sampled_from((0.0, 5.0, 20.0, 100.0)),
    st.sampled_from((0.5, 20.0)),
    st.integers(1, 4),
    st.sampled_from((1.0, 50.0, 1e6)),
    st.sampled_from((0.0, 0.2, 3.0)),
)


@st.composite
def clusters(draw: st.DrawFn) -> list[WorkerLoad]:
    loads = []
    for index, drawn in enumerate(draw(st.lists(sizes, min_size=1, max_size=4))):
        requests = (
            request(f"{index}.{number}", num_blocks, num_remaining, priority=priority, may_move=may_move)
            for number, (num_blocks, num_remaining, priority, may_move) in enumerate(drawn)
        )
        others = draw(st.sampled_from((0, 0, 30)))
        leaving = draw(st.sampled_from((False, False, False, True)))
        loads.append(worker(f"d-{index}", *requests, num_other_blocks=others, is_leaving=leaving))
    return loads


class Cluster:
    """Does what is wanted, at once."""

    def __init__(self, loads: list[WorkerLoad]) -> None:
        self.workers = {load.worker_id: load for load in loads}

    def place_of(self, request_id: str) -> tuple[WorkerLoad, DecodeLoad]:
        return next(
            (load, one) for load in self.workers.values() for one in load.requests if one.request_id == request_id
        )

    def move(self, wanted: MigrationWanted) -> tuple[WorkerLoad, WorkerLoad]:
        """Both as they were."""
        source, one = self.place_of(wanted.request_id)
        destination = self.workers[wanted.to_worker_id]
        assert one.may_move and source is not destination
        rest = tuple(other for other in source.requests if other is not one)
        self.workers[source.worker_id] = replace(source, requests=rest)
        self.workers[destination.worker_id] = replace(destination, requests=(*destination.requests, one))
        return source, destination


@settings(deadline=None)
@given(clusters(), configs)
def test_every_move_helps_the_one_and_does_not_harm_the_other(loads: list[WorkerLoad], config: ReliefConfig) -> None:
    cluster = Cluster(loads)
    wanted = Relief(config, BLOCK).decide(loads, 0.0)
    for one in wanted:
        _, moved = cluster.place_of(one.request_id)
        source, destination = cluster.move(one)
        assert freeness(source) < config.low_freeness and not destination.is_leaving
        assert freeness(destination) > (config.low_freeness if source.is_leaving else config.high_freeness)
        after = freeness(cluster.workers[destination.worker_id])
        assert after > config.low_freeness
        assert after >= freeness(cluster.workers[source.worker_id])
        assert source.is_leaving or moved.num_remaining_tokens >= config.min_remaining_tokens
    assert len({one.request_id for one in wanted}) == len(wanted)


@settings(deadline=None)
@given(clusters(), configs)
def test_a_load_that_stays_comes_to_rest(loads: list[WorkerLoad], config: ReliefConfig) -> None:
    """However short the cool-down: no request moves twice."""
    cluster, relief, now = Cluster(loads), Relief(config, BLOCK), 0.0
    moved: list[str] = []
    while wanted := relief.decide(list(cluster.workers.values()), now):
        now += 1000.0  # all is paid for
        for one in wanted:
            assert one.request_id not in moved
            moved.append(one.request_id)
            cluster.move(one)


@settings(deadline=None, max_examples=50)
@given(clusters(), configs, st.lists(st.tuples(st.floats(0.0, 2.0), st.integers(0, 5)), max_size=10))
def test_budget_and_pauses_hold_on_any_load(
    loads: list[WorkerLoad], config: ReliefConfig, steps: list[tuple[float, int]]
) -> None:
    """Requests grow as they please, and what is wanted is done by the next look."""
    cluster, relief, now = Cluster(loads), Relief(config, BLOCK), 0.0
    begun: list[tuple[float, str, str, str, int]] = []
    for gap_s, growth in steps:
        now += gap_s
        num_begun = dict.fromkeys(cluster.workers, 0)
        for wanted in relief.decide(list(cluster.workers.values()), now):
            source, one = cluster.place_of(wanted.request_id)
            cluster.move(wanted)
            begun.append((now, wanted.request_id, source.worker_id, wanted.to_worker_id, one.num_blocks * NBYTES))
            for worker_id in (source.worker_id, wanted.to_worker_id):
                num_begun[worker_id] += 1
        assert max(num_begun.values()) <= config.max_migrations
        for worker_id, load in cluster.workers.items():
            grown = tuple(replace(one, num_blocks=one.num_blocks + growth) for one in load.requests)
            cluster.workers[worker_id] = replace(load, requests=grown)
    for index, (at, request_id, source_id, destination_id, _) in enumerate(begun):
        for earlier_at, earlier_id, *pair, _ in begun[:index]:
            if at - earlier_at < config.cooldown_s:
                assert request_id != earlier_id
                assert pair != [destination_id, source_id]
    for worker_id in cluster.workers:
        mine = [(at, nbytes) for at, _, *pair, nbytes in begun if worker_id in pair]
        for first in range(len(mine)):
            for last in range(first + 1, len(mine) + 1):
                span_s = mine[last - 1][0] - mine[first][0]
                num_bytes = sum(nbytes for _, nbytes in mine[first : last - 1])  # the last one may go beyond it
                assert num_bytes <= config.max_nbytes_per_s * (span_s + BURST_S) * (1 + 1e-9)
