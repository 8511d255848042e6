from __future__ import annotations

from collections.abc import Callable

from hypothesis import given
from hypothesis import strategies as st

from protos.types import Role
from router.cluster_view import ClusterView
from router.events import WorkerDown, WorkerUp
from router.placement import Planner
from router.policy import by_pending, by_room
from router.ranking import Key, Ranking
from router.router import Router
from tests.router.values import CONFIG, arrived, make_router, peer, reported, stats

STEPS = st.lists(st.tuples(st.sampled_from("abcd"), st.one_of(st.none(), st.integers(0, 3))), max_size=40)


@given(STEPS)
def test_members_stand_in_the_order_of_their_latest_keys(steps: list[tuple[str, int | None]]) -> None:
    loads: dict[str, int] = {}
    ranking: Ranking[str] = Ranking(lambda worker_id: (loads[worker_id], 0, worker_id))
    for worker_id, load in steps:
        if load is None:
            loads.pop(worker_id, None)
            ranking.remove(worker_id)
        else:
            loads[worker_id] = load
            ranking.put(worker_id, worker_id)
        assert ranking.members == sorted(loads, key=lambda name: (loads[name], name))


def assert_ranked(view: ClusterView) -> None:
    """Against an order made from nothing."""
    orders: tuple[tuple[Role, Callable[..., Key]], ...] = ((Role.PREFILL, by_pending), (Role.DECODE, by_room))
    for role, key in orders:
        members = view.prefill_workers() if role is Role.PREFILL else view.decode_workers()
        assert list(members) == sorted((w for w in view.workers.values() if w.ref.role is role), key=key)


@given(st.lists(st.integers(0, 9), min_size=1, max_size=30))
def test_the_view_ranks_by_what_was_placed_and_reported(picks: list[int]) -> None:
    workers = ("p-0", "p-1", "p-2", "d-0", "d-1", "d-2")
    router: Router = make_router(*workers)
    for index, pick in enumerate(picks):
        worker_id = workers[pick % 6]
        if pick < 6:
            router.on(arrived(f"r{index}", list(range(pick, 3 * pick + 3))), 0.0)
        elif pick < 8:
            router.on(reported(worker_id, stats=stats(num_free_blocks=7 * index)), 0.0)
        else:
            router.on(WorkerDown(worker_id, "1", "test"), 0.0)
            router.on(WorkerUp(peer(worker_id)), 0.0)
        assert_ranked(router.view)


def test_a_decode_worker_that_refused_is_passed_over() -> None:
    router = make_router("p-0", "d-0", "d-1", "d-2")
    router.on(reported("d-1", stats=stats(num_free_blocks=10)), 0.0)
    planner, prefill = Planner(CONFIG, router.view), router.view.workers["p-0"]
    named = [
        found[0].worker_id if (found := planner.decode.choose(prefill, (), 4, 8, refused)) else None
        for refused in ((), ("d-0",), ("d-0", "d-2"), ("d-0", "d-1", "d-2"))
    ]
    assert named == ["d-0", "d-2", "d-1", None]
