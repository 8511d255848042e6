"""What routers say of the pools, added up, and what comes of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import pytest

from cluster.config import ServeConfig, load_config
from protos.types import FinishReason, HandoffRefused, Role
from router.autoscaler import AutoscalerConfig, PoolLoad, Resize
from router.autoscaling import LOOK_INTERVAL_S, Autoscaling
from router.events import Deliver, Fail, RefusedFor
from router.pool_counts import PoolCounts, PoolWatch
from tests.cluster.routers_of_fakes import Cluster
from tests.router.conftest import CONFIG as FAKES
from tests.router.conftest import eventually
from tests.router.values import CONFIG, arrived, make_router, output, reported, stats

AT_ONCE = AutoscalerConfig(enabled=True, grow_after_s=0.0, cool_down_s=0.0)
SIZES = {Role.PREFILL: 2, Role.DECODE: 2}


def test_requests_of_two_routers_add_up_and_what_workers_say_does_not() -> None:
    one = Autoscaling(AT_ONCE, may_turn=True)
    good = PoolCounts(num_ended=90, num_in_slo=90, num_looks=4, queue=2.0, use=2.0)
    bad = PoolCounts(num_ended=10, num_in_slo=0, num_looks=2, queue=0.2, use=1.0)
    for now in (0.0, 1.0):
        assert one.heard("router-0", {Role.DECODE: good}, SIZES, now) == []
    (resize,) = one.heard("router-1", {Role.DECODE: bad}, SIZES, LOOK_INTERVAL_S)
    assert resize.reason == "decode 2 -> 3: 94.7% of requests meet the TPOT SLO, 95.0% should"
    # Half a second waits in the one, a tenth in the other; both see half of the pool in use.
    load = Autoscaling(AT_ONCE, may_turn=True)
    load._counts = {"router-0": {Role.DECODE: good}, "router-1": {Role.DECODE: bad}}
    found = load._load(Role.DECODE, 2, 0.0)
    assert found is not None
    assert found.queue == pytest.approx(0.6)
    assert (found.use, found.attainment) == (0.5, 0.9)


def test_what_decodes_elsewhere_is_known_to_one_router_each() -> None:
    load = Autoscaling(AT_ONCE, may_turn=True)
    counts = {Role.DECODE: PoolCounts(num_looks=2, use=1.8, use_elsewhere=0.4)}
    load._counts = {"router-0": counts, "router-1": counts}
    found = load._load(Role.DECODE, 2, 0.0)
    assert found is not None and found.use == pytest.approx(1.3)


@pytest.mark.parametrize("changes_roles", [False, True])
def test_a_worker_goes_over_only_where_roles_may_change(changes_roles: bool) -> None:
    one = Autoscaling(replace(AT_ONCE, changes_roles=changes_roles), may_turn=True)
    both = [Resize(Role.PREFILL, 3, "short"), Resize(Role.DECODE, 1, "ample")]
    assert one.at_once(both) == ([both] if changes_roles else [both[:1], both[1:]])
    assert one.at_once([]) == []


class Recorder:
    """In the autoscaler's place: what it is shown."""

    def __init__(self) -> None:
        self.attainments: list[float] = []

    def decide(self, loads: Mapping[Role, PoolLoad], now: float) -> list[Resize]:
        self.attainments += [load.attainment for role, load in loads.items() if role is Role.DECODE]
        return []


def attainments(ended: list[tuple[int, int]], settled: Callable[[int], bool] = lambda number: True) -> list[float]:
    """At every look at which the pool may change, of requests that ended and those of them in their SLO."""
    one, recorder = Autoscaling(replace(AT_ONCE, window_s=20.0), may_turn=True), Recorder()
    one._autoscaler = recorder  # type: ignore[assignment]
    one.heard("router-0", {}, SIZES, 0.0)
    for number, (num_ended, num_in_slo) in enumerate(ended):
        counts = {Role.DECODE: PoolCounts(num_ended, num_in_slo, num_looks=1)}
        one.heard("router-0", counts, SIZES if settled(number) else {Role.PREFILL: 2}, (number + 1) * LOOK_INTERVAL_S)
    return recorder.attainments


def test_attainment_is_of_many_requests_and_not_of_the_few_between_two_looks() -> None:
    found = attainments([(9, 9), (1, 0), (90, 90), (100, 100), (0, 0), (0, 0), (0, 0), (0, 0)])
    assert found == pytest.approx([1.0, 0.9, 0.99, 199 / 200, 190 / 191, 1.0, 1.0, 1.0])


def test_what_came_of_requests_while_a_pool_was_changing_counts_no_more_when_it_has_changed() -> None:
    ended = [(50, 0), (50, 0), (50, 50), (50, 50)]
    assert attainments(ended, lambda number: number >= 2) == [1.0, 1.0]
    assert attainments(ended)[-1] == 0.5


def test_a_pool_that_nobody_has_seen_stays_as_it_is() -> None:
    one = Autoscaling(AT_ONCE, may_turn=True)
    nothing = PoolCounts(num_ended=3)
    assert one.heard("router-0", {Role.DECODE: nothing}, SIZES, 0.0) == []
    assert one.heard("router-0", {Role.DECODE: nothing}, SIZES, LOOK_INTERVAL_S) == []


def test_a_watch_counts_who_met_which_slo_and_how_full_the_pools_are() -> None:
    router = make_router("p-0", "p-1", "d-0")
    watch = PoolWatch(replace(CONFIG, ttft_slo_s=1.0, tpot_slo_s=0.1))
    watch.look(router.view)
    watch.heard(ended(0.5, 0.2))
    watch.heard(ended(1.5, 0.05))
    router.on(arrived("r", [*range(10)]), 0.0)
    router.on(reported("p-0", stats=stats(num_pending_prefill_tokens=5, prefill_s_per_token=0.1)), 1.0)
    router.on(reported("p-1", stats=stats(prefill_s_per_token=0.1)), 1.0)
    router.on(reported("d-0", stats=stats(num_held_blocks=30, num_leased_blocks=10, num_free_blocks=60)), 1.0)
    watch.look(router.view)
    counts = watch.take()
    prefill, decode = counts[Role.PREFILL], counts[Role.DECODE]
    assert (prefill.num_ended, prefill.num_in_slo, prefill.num_looks, prefill.use) == (2, 1, 2, 0.5)
    assert (decode.num_ended, decode.num_in_slo, decode.num_looks, decode.queue) == (2, 1, 2, 0.0)
    assert (prefill.queue, decode.use) == (pytest.approx(0.5), pytest.approx(0.4))
    assert set(watch.take().values()) == {PoolCounts()}


def test_what_decodes_where_it_was_prefilled_is_what_the_decode_pool_lacks() -> None:
    router, watch = make_router("p-0", "d-0"), PoolWatch(CONFIG)
    router.on(arrived("r", [*range(40)]), 0.0)
    attempt = router._in_flight["r"].attempt
    assert attempt is not None
    router.on(reported("d-0", stats=stats(num_held_blocks=90, num_free_blocks=10)), 0.1)
    router.on(reported("p-0", refusals=(HandoffRefused("r", 1, "no room"),)), 0.1)
    router.on(reported("p-0", output("r", 0, 1), stats=stats(num_running=1)), 0.2)
    watch.look(router.view)
    counts = watch.take()
    assert counts[Role.DECODE].use == pytest.approx(0.9)
    assert counts[Role.DECODE].use_elsewhere == pytest.approx(0.1), "10 blocks of 4 tokens"
    assert counts[Role.PREFILL].use == 0.0, "it prefills nothing"


def ended(ttft_s: float, tpot_s: float, finish_reason: FinishReason = FinishReason.LENGTH) -> Deliver:
    router = make_router("p-0", "d-0")
    router.on(arrived("r", [*range(10)]), 0.0)
    account = router._in_flight["r"].account(1.0)
    return Deliver("r", 0, (), 0, finish_reason, replace(account, ttft_s=ttft_s, tpot_s=tpot_s))


def refused(reason: RefusedFor | None) -> Fail:
    return Fail("r", "RESOURCE_EXHAUSTED", "test", refused_for=reason)


@pytest.mark.parametrize(
    ("reason", "num_prefill", "num_decode"),
    [
        (RefusedFor.SLO, 1, 0),
        (RefusedFor.WORKERS_FULL, 0, 1),
        (RefusedFor.MAX_IN_FLIGHT, 1, 1),
        (RefusedFor.DUPLICATE_ID, 0, 0),
        (None, 0, 0),
    ],
)
def test_a_request_that_was_refused_for_want_of_room_has_missed_its_slo(
    reason: RefusedFor | None, num_prefill: int, num_decode: int
) -> None:
    watch = PoolWatch(CONFIG)
    watch.heard(refused(reason))
    counts = watch.take()
    assert counts[Role.PREFILL] == PoolCounts(num_ended=num_prefill)
    assert counts[Role.DECODE] == PoolCounts(num_ended=num_decode)


def test_one_that_was_cut_off_counts_for_nothing() -> None:
    watch = PoolWatch(CONFIG)
    watch.heard(ended(0.0, 0.0, FinishReason.ABORT))
    watch.heard(Deliver("r", 0, (1,)))
    assert set(watch.take().values()) == {PoolCounts()}


async def test_routers_tell_how_the_pools_do() -> None:
    cluster = Cluster(FAKES)
    try:
        await cluster.start("p-0", "d-0")
        for client in cluster.clients:
            await client.generate("abc")
        await eventually(lambda: cluster.pool_counts[Role.DECODE].num_ended == 2)
        assert cluster.pool_counts[Role.PREFILL].num_looks > 0
    finally:
        await cluster.stop()


def test_it_is_off_by_default_and_its_settings_can_be_set() -> None:
    assert not ServeConfig().autoscaler.enabled
    overrides = {"autoscaler.enabled": True, "autoscaler.prefill.max_workers": 3, "autoscaler.decode.min_workers": 2}
    config = load_config(None, overrides).autoscaler
    assert (config.enabled, config.prefill.max_workers, config.decode.min_workers) == (True, 3, 2)
    with pytest.raises(ValueError, match="min_workers must be within 0 and max_workers 3, got 5"):
        load_config(None, {"autoscaler.prefill.max_workers": 3, "autoscaler.prefill.min_workers": 5})
