"""What routers say of the pools, added up, and what comes of it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cluster.autoscaling import LOOK_INTERVAL_S, Autoscaling
from cluster.config import ServeConfig, load_config
from protos.types import Role
from router.autoscaler import AutoscalerConfig
from router.pool_counts import PoolCounts, PoolWatch
from tests.cluster.routers_of_fakes import Cluster
from tests.router.conftest import CONFIG as FAKES
from tests.router.conftest import eventually
from tests.router.values import CONFIG, arrived, make_router, reported, stats

AT_ONCE = AutoscalerConfig(enabled=True, grow_after_s=0.0, cool_down_s=0.0)
SIZES = {Role.PREFILL: 2, Role.DECODE: 2}


def test_requests_of_two_routers_add_up_and_what_workers_say_does_not() -> None:
    one = Autoscaling(AT_ONCE)
    good = PoolCounts(num_ended=90, num_in_slo=90, num_looks=4, queue_s=2.0, use=2.0)
    bad = PoolCounts(num_ended=10, num_in_slo=0, num_looks=2, queue_s=0.2, use=1.0)
    for now in (0.0, 1.0):
        assert one.heard("router-0", {Role.DECODE: good}, SIZES, now) == []
    (resize,) = one.heard("router-1", {Role.DECODE: bad}, SIZES, LOOK_INTERVAL_S)
    assert resize.reason == "decode 2 -> 3: 94.7% of requests meet the TPOT SLO, 95.0% should"
    # Half a second waits in the one, a tenth in the other; both see half of the pool in use.
    load = Autoscaling(AT_ONCE)
    load._counts = {"router-0": {Role.DECODE: good}, "router-1": {Role.DECODE: bad}}
    found = load._load(Role.DECODE, 2)
    assert found is not None
    assert found.queue_s == pytest.approx(0.6)
    assert (found.use, found.attainment) == (0.5, 0.9)


def test_a_pool_that_nobody_has_seen_stays_as_it_is() -> None:
    one = Autoscaling(AT_ONCE)
    nothing = PoolCounts(num_ended=3)
    assert one.heard("router-0", {Role.DECODE: nothing}, SIZES, 0.0) == []
    assert one.heard("router-0", {Role.DECODE: nothing}, SIZES, LOOK_INTERVAL_S) == []


def test_a_watch_counts_who_met_which_slo_and_how_full_the_pools_are() -> None:
    router = make_router("p-0", "p-1", "d-0")
    watch = PoolWatch(replace(CONFIG, ttft_slo_s=1.0, tpot_slo_s=0.1))
    watch.look(router.view)
    watch.ended(0.5, 0.2)
    watch.ended(1.5, 0.05)
    router.on(arrived("r", [*range(10)]), 0.0)
    router.on(reported("p-0", stats=stats(num_running=1, prefill_s_per_token=0.1)), 1.0)
    router.on(reported("p-1", stats=stats(prefill_s_per_token=0.1)), 1.0)
    router.on(reported("d-0", stats=stats(num_held_blocks=30, num_leased_blocks=10, num_free_blocks=60)), 1.0)
    watch.look(router.view)
    counts = watch.take()
    prefill, decode = counts[Role.PREFILL], counts[Role.DECODE]
    assert (prefill.num_ended, prefill.num_in_slo, prefill.num_looks, prefill.use) == (2, 1, 2, 0.5)
    assert (decode.num_ended, decode.num_in_slo, decode.num_looks, decode.queue_s) == (2, 1, 2, 0.0)
    assert (prefill.queue_s, decode.use) == (pytest.approx(0.5), pytest.approx(0.4))
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
