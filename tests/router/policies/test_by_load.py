from __future__ import annotations

from collections import Counter

from router.policies.by_load import LeastLoaded, Random, RoundRobin
from tests.router.policies.view import FakeView, Load

LOADS = {"p-0": Load(30), "p-1": Load(10, num_cached_tokens=32), "p-2": Load(20)}


def test_in_turn() -> None:
    policy = RoundRobin()
    assert [policy.place(FakeView(LOADS)).worker_id for _ in range(4)] == ["p-0", "p-1", "p-2", "p-0"]


def test_at_random_takes_each_about_as_often() -> None:
    chosen = Counter(Random().place(FakeView(LOADS, seed=seed)).worker_id for seed in range(600))
    assert all(150 < chosen[worker_id] < 250 for worker_id in LOADS), chosen


def test_the_lightest() -> None:
    choice = LeastLoaded().place(FakeView(LOADS))
    assert (choice.worker_id, choice.reason) == ("p-1", "lightest: 10 tokens pending")
