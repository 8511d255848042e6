"""Relief inside a Router: what it takes for the load of a worker, and that a Tick starts migrations."""

from __future__ import annotations

from dataclasses import replace

from protos.types import MigrationFailed, TransferStats
from router.config import RouterConfig
from router.events import MigrationWanted, Send, Tick, WorkerDown, WorkerDraining, WorkerUp
from router.freeness import DecodeLoad, WorkerLoad
from router.relief import FAILED_PAUSE_S, ReliefConfig
from router.reliever import worker_loads
from router.router import Router
from tests.router.values import CONFIG, arrived, make_router, output, peer, reported, sends, stats

# Every worker has 100 blocks of 4 tokens.
RELIEF = ReliefConfig(low_freeness=20.0, high_freeness=40.0, min_remaining_tokens=8)
RELIEVES = replace(CONFIG, relieves=True, relief=RELIEF)
NBYTES = TransferStats(block_nbytes=1000)


def loads(router: Router, config: RouterConfig = RELIEVES) -> dict[str, WorkerLoad]:
    found = worker_loads(config, router.view, router.planner.decode, router._in_flight.values())
    return {load.worker_id: load for load in found}


def crowded(num: int = 9, config: RouterConfig = RELIEVES) -> Router:
    """num requests of 40 tokens decode on d-0; d-1 has joined since. 9 leave 36 tokens: 4 for each."""
    router = make_router("p-0", "d-0", config=config)
    for index in range(num):
        router.on(arrived(f"r{index}", list(range(40)), max_tokens=60), 0.0)
        router.on(reported("p-0", output(f"r{index}", 0, 1)), 0.0)
        router.on(reported("d-0", output(f"r{index}", 1, 2)), 0.0)
    router.on(WorkerUp(peer("d-1")), 0.0)
    router.on(reported("d-1", stats=stats(transfers=NBYTES)), 0.0)
    router.on(reported("d-0", stats=stats(num_free_blocks=100 - 11 * num, num_running=num, transfers=NBYTES)), 0.0)
    return router


def migrated(router: Router, now: float = 1.0) -> list[str]:
    """The requests that begin to."""
    told = [each for each in router.on(Tick(), now) if isinstance(each, Send)]
    return [one.request_id for send in told for one in send.migrates]


def test_the_load_of_a_worker_is_what_its_requests_need_and_what_others_hold() -> None:
    router = crowded(2)
    r0 = DecodeLoad("r0", num_blocks=11, num_remaining_tokens=58)
    assert loads(router)["d-0"] == WorkerLoad("d-0", 100, (r0, replace(r0, request_id="r1")), block_nbytes=1000)
    assert set(loads(router)) == {"d-0", "d-1"}
    router.on(reported("d-0", stats=stats(num_free_blocks=40, num_cached_blocks=20, num_running=3, num_waiting=1)), 0.0)
    here = loads(router)["d-0"]
    assert (here.num_other_blocks, here.num_other_requests) == (100 - 60 - 22, 2), "what is cached may be had"


def test_one_that_has_not_begun_to_decode_needs_its_memory_and_stays() -> None:
    router = crowded(1)
    router.on(arrived("new", list(range(100, 120)), max_tokens=60), 0.0)
    (new,) = loads(router)["d-1"].requests
    assert (new.request_id, new.num_blocks, new.may_move) == ("new", 5, False)
    router.on(reported("p-0", output("new", 0, 1)), 0.0)
    assert not loads(router)["d-1"].requests[0].may_move
    router.on(reported("d-1", output("new", 1, 1)), 0.0)
    assert loads(router)["d-1"].requests[0].may_move


def test_a_tick_relieves_the_crowded_worker() -> None:
    router = crowded()
    effects = router.on(Tick(), 1.0)
    assert [send.worker_id for send in effects if isinstance(send, Send)] == ["d-1", "d-0"] * 2
    to_d1, to_d0, *_ = (send for send in effects if isinstance(send, Send))
    assert [each.request_id for each in to_d1.submits] == ["r0"]
    assert [each.request_id for each in to_d0.migrates] == ["r0"]
    there, here = loads(router)["d-1"], loads(router)["d-0"]
    assert [one.may_move for one in there.requests] == [False, False], "on the way: they count there"
    assert (there.num_migrations, here.num_migrations, len(here.requests)) == (2, 2, 7)
    assert (here.num_other_blocks, here.num_other_requests) == (0, 0), "they hold memory here, and are nobody else's"
    assert migrated(router, 1.25) == [], "two at a time"


def test_one_that_has_arrived_counts_there_and_the_reason_is_told() -> None:
    router = crowded()
    router.on(Tick(), 1.0)
    router.on(reported("d-1", output("r0", 2, 3)), 1.1)
    assert loads(router)["d-1"].num_migrations == 1
    attempt = router._in_flight["r0"].attempt
    assert attempt is not None
    assert attempt.plan.decode_reason == (
        "migrated from d-0: d-0 is full in 0 steps, d-1 in 400; 11 blocks to move, about 58 tokens to come"
    )


def test_one_that_failed_is_left_alone_for_a_while() -> None:
    router = crowded()
    router.on(Tick(), 1.0)
    for request_id in ("r0", "r1"):
        attempt = router._in_flight[request_id].attempt
        assert attempt is not None and attempt.migration is not None
        failed = MigrationFailed(request_id, 1, attempt.migration.transfer_id, "no room")
        router.on(reported("d-0", failed_migrations=(failed,)), 1.1)
    assert migrated(router, 1.25) == [], "nor is the same way tried at once"
    assert migrated(router, 1.1 + FAILED_PAUSE_S) == ["r2", "r3"]


def test_a_worker_that_runs_as_many_as_it_can_takes_none() -> None:
    router = crowded()
    full = stats(transfers=NBYTES, num_running=3, max_num_seqs=3)
    router.on(reported("d-1", stats=full), 0.5)
    assert loads(router)["d-1"].max_num_seqs == 3
    assert migrated(router) == []
    router.on(reported("d-1", stats=replace(full, max_num_seqs=4)), 1.1)
    assert migrated(router, 1.25) == ["r0"], "one"


def test_nothing_moves_where_it_is_off_or_where_there_is_room() -> None:
    assert migrated(crowded(config=replace(RELIEVES, relieves=False))) == []
    assert migrated(crowded(3)) == []
    router = crowded()
    router.on(WorkerDown("d-1", "1", "test"), 0.5)
    assert migrated(router) == []


def test_a_worker_that_drains_is_emptied_also_where_relief_is_off() -> None:
    router = crowded(2, config=replace(RELIEVES, relieves=False))
    router.on(WorkerDraining("d-0", "1"), 0.5)
    assert loads(router)["d-0"].is_leaving
    router.on(Tick(), 1.0)
    assert [one.request_id for one in loads(router)["d-1"].requests] == ["r0", "r1"]


def test_where_every_worker_serves_from_end_to_end_all_are_looked_at() -> None:
    colocated = replace(RELIEVES, mode="colocated")
    router = make_router("p-0", "p-1", config=colocated)
    router.on(arrived("r0", list(range(40)), max_tokens=60), 0.0)
    found = loads(router, colocated)
    assert set(found) == {"p-0", "p-1"}
    (worker_id,) = (name for name, load in found.items() if load.requests)
    router.on(reported(worker_id, output("r0", 0, 1)), 0.1)
    assert loads(router, colocated)[worker_id].requests[0].may_move
    (other,) = found.keys() - {worker_id}
    effects = router.on(MigrationWanted("r0", other, "test"), 0.2)
    assert set(sends(effects)) == {worker_id, other}
