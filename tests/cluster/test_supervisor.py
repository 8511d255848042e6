"""The supervisor with real routers, and actors that are fakes in this process: who comes, who goes, who takes whose
place. The same with Ray and real workers: test_drain.py."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import pytest

from cluster import supervisor as module
from cluster.aio_client import AsyncClient
from cluster.client_types import Sampling
from cluster.config import ServeConfig
from cluster.router_handle import LocalRouter
from cluster.routers import Routers
from cluster.supervisor import Supervisor
from engine.worker import WorkerReady
from engine.worker_config import WorkerSpec
from protos.types import PeerRef, Role
from router.autoscaler import AutoscalerConfig
from router.config import RouterConfig
from router.pool_counts import PoolCounts
from router.published_view import Drain, Scale
from tests.router.conftest import CONFIG, SERVED, eventually
from tests.router.fake_worker import Fabric, FakeWorker

LONG = Sampling(max_tokens=40)


class FakeActor:
    """Has the shape of ActorHandle."""

    fabric: Fabric
    made: list[FakeActor]
    fails_to_become = False
    numerics = ""
    may_load: asyncio.Event
    may_stop: asyncio.Event

    def __init__(self, spec: WorkerSpec, *others: object) -> None:
        self.spec = spec
        self.ref: PeerRef | None = None
        self.lives: list[FakeWorker] = []
        self.is_killed = False
        FakeActor.made.append(self)

    async def progress(self) -> str:
        return "loading"

    async def load(self) -> None:
        await FakeActor.may_load.wait()

    async def serve(self) -> WorkerReady:
        worker = FakeWorker(self.spec.worker_id, FakeActor.fabric, self.spec.incarnation)
        worker.warm_links = tuple(f"decode-{number}" for number in range(9))
        self.lives.append(worker)
        self.ref = await worker.start()
        return WorkerReady(self.ref, 1, 64, 200, "echo-model", FakeActor.numerics)

    async def become(self, spec: WorkerSpec) -> WorkerReady:
        await self.lives[-1].kill()
        if FakeActor.fails_to_become:
            raise OSError("no port")
        self.spec = spec
        return await self.serve()

    async def stop(self, grace_s: float) -> None:
        await FakeActor.may_stop.wait()
        if self.lives:
            await self.lives[-1].kill()

    def kill(self) -> None:
        self.is_killed = True


class Cluster:
    def __init__(self, config: ServeConfig) -> None:
        self.routers = Routers([CONFIG], LocalRouter.made_for(SERVED), lambda who, what: None)
        self.supervisor = Supervisor(config, b"k" * 32, self.routers, lambda who, what: None, "error")
        self.routers.wire(self.supervisor)
        self.config = config
        self.client: AsyncClient

    async def start(self) -> None:
        (address,) = await self.routers.start(self.config.num_prefill, self.config.num_decode)
        await self.supervisor.start()
        await self.routers.wait_ready(20)
        self.client = AsyncClient(address.grpc)

    async def stop(self) -> None:
        await self.client.close()
        await self.routers.stop(0)
        await self.supervisor.stop()

    async def states(self) -> dict[str, str]:
        return {load.worker_id: load.state for load in (await self.client.status()).workers}

    async def until(self, **expected: str) -> None:
        """By worker, with underscores for dashes."""
        wanted = {name.replace("_", "-"): state for name, state in expected.items()}
        async with asyncio.timeout(20):
            while await self.states() != wanted:  # noqa: ASYNC110 (what is waited for has no event)
                await asyncio.sleep(0.02)

    async def events(self) -> list[str]:
        return [event.message for event in (await self.client.status()).events]


@pytest.fixture(autouse=True)
def _fakes(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("may_load", "may_stop"):
        allowed = asyncio.Event()
        allowed.set()
        monkeypatch.setattr(FakeActor, name, allowed, raising=False)
    monkeypatch.setattr(module, "ActorHandle", FakeActor)
    monkeypatch.setattr(FakeActor, "fabric", Fabric(token_s=0.02), raising=False)
    monkeypatch.setattr(FakeActor, "made", [], raising=False)
    monkeypatch.setattr(FakeActor, "fails_to_become", False)
    monkeypatch.setattr(FakeActor, "numerics", "")


@pytest.fixture
async def cluster() -> AsyncIterator[Cluster]:
    one = Cluster(ServeConfig(num_prefill=2, num_decode=2, worker_drain_timeout_s=10.0))
    await one.start()
    yield one
    await one.stop()


def actor_of(worker_id: str) -> FakeActor:
    """The last one of that name."""
    return next(actor for actor in reversed(FakeActor.made) if actor.spec.worker_id == worker_id)


async def test_one_that_is_drained_finishes_and_is_not_replaced(cluster: Cluster) -> None:
    stream = cluster.client.stream("abc", LONG)
    await anext(stream)
    busy = next(actor for actor in FakeActor.made if actor.spec.role is Role.DECODE and actor.lives[0].generating)
    assert cluster.supervisor.on_order(Drain(busy.spec.worker_id)) == ""
    assert cluster.supervisor.on_order(Drain(busy.spec.worker_id)).startswith("no worker or router is called")
    await asyncio.sleep(0.2)
    assert (await cluster.states())[busy.spec.worker_id] == "draining"
    assert [chunk async for chunk in stream][-1].completion is not None
    other = "decode-1" if busy.spec.worker_id == "decode-0" else "decode-0"
    await cluster.until(**{"prefill_0": "up", "prefill_1": "up", other.replace("-", "_"): "up"})
    await eventually(lambda: busy.is_killed)
    assert len(FakeActor.made) == 4
    assert (await cluster.client.status()).ready, "nobody is missing"
    assert cluster.supervisor.on_order(Drain(other)) == "", "prefill workers can do without"


async def test_one_that_is_told_to_leave_has_a_successor(cluster: Cluster) -> None:
    former = actor_of("prefill-1")
    assert former.ref is not None
    for _ in range(3):  # it says so with every report
        cluster.supervisor.on_worker_leaving(former.ref)
    await eventually(lambda: actor_of("prefill-1") is not former)
    await cluster.until(prefill_0="up", prefill_1="up", decode_0="up", decode_1="up")
    assert former.is_killed
    assert len(FakeActor.made) == 5
    cluster.supervisor.on_worker_leaving(former.ref)
    await asyncio.sleep(0.2)
    assert len(FakeActor.made) == 5, "its former life has nothing to say"


async def test_one_that_computes_other_bits_is_not_shown(cluster: Cluster) -> None:
    """Of deterministic workers, say on another processor: the place stays empty until one comes that computes alike."""
    former = actor_of("decode-1")
    assert former.ref is not None
    FakeActor.numerics = "other"
    cluster.supervisor.on_worker_leaving(former.ref)
    await cluster.until(prefill_0="up", prefill_1="up", decode_0="up")
    await eventually(lambda: actor_of("decode-1") is not former and actor_of("decode-1").lives)
    refused = [event for event in await cluster.events() if "decode-1 could not be replaced" in event]
    assert "worker decode-1 computes other bits than" in refused[0]
    FakeActor.numerics = ""
    await cluster.until(prefill_0="up", prefill_1="up", decode_0="up", decode_1="up")
    for refused_one in FakeActor.made[4:-1]:
        for life in refused_one.lives:
            await life.kill()


async def test_one_that_dies_while_it_drains_is_replaced_once_if_at_all(cluster: Cluster) -> None:
    for worker_id, replaces in (("decode-0", True), ("decode-1", False)):
        dying = actor_of(worker_id)
        dying.lives[0].num_held_blocks = 1  # so that it does not end by itself
        assert cluster.supervisor.on_order(Drain(worker_id, 20.0, replaces)) == ""
        await asyncio.sleep(0.3)
        assert (await cluster.states())[worker_id] == "draining"
        await dying.lives[0].kill()
        await eventually(lambda dying=dying: dying.is_killed)  # type: ignore[misc]
    await cluster.until(prefill_0="up", prefill_1="up", decode_0="up")
    assert [actor.spec.worker_id for actor in FakeActor.made[4:]] == ["decode-0"]


async def test_pools_grow_and_shrink_and_workers_change_their_roles(cluster: Cluster) -> None:
    assert cluster.supervisor.on_order(Scale((("decode", 1), ("prefill", 4)))) == ""
    await cluster.until(prefill_0="up", prefill_1="up", prefill_2="up", prefill_3="up", decode_0="up")
    turned = actor_of("prefill-3" if len(actor_of("prefill-3").lives) == 2 else "prefill-2")
    assert [life.worker_id for life in turned.lives] == ["decode-1", turned.spec.worker_id]
    assert len(FakeActor.made) == 5, "one started, one changed over"
    assert "worker decode-1 became prefill-2" in await cluster.events()
    assert cluster.supervisor.on_order(Scale((("prefill", 1),))) == ""
    await cluster.until(prefill_0="up", decode_0="up")
    assert (await cluster.client.status()).ready
    assert cluster.supervisor.on_order(Scale((("prefill", 0),))) == "num_prefill must be at least 1, not 0"
    assert (await cluster.client.generate("abc", LONG)).text


async def test_where_one_cannot_change_over_another_one_starts(cluster: Cluster) -> None:
    FakeActor.fails_to_become = True
    former = actor_of("decode-1")
    assert cluster.supervisor.on_order(Scale((("decode", 1), ("prefill", 3)))) == ""
    await cluster.until(prefill_0="up", prefill_1="up", prefill_2="up", decode_0="up")
    assert former.is_killed
    assert len(FakeActor.made) == 5
    assert any("did not become prefill-2: OSError('no port')" in event for event in await cluster.events())


async def test_one_that_is_not_wanted_any_more_before_it_serves_goes_at_once(cluster: Cluster) -> None:
    FakeActor.may_load.clear()
    assert cluster.supervisor.on_order(Scale((("decode", 3),))) == ""
    await eventually(lambda: len(FakeActor.made) == 5)
    assert cluster.supervisor.on_order(Drain("decode-2")) == "decode-2 does not serve yet"
    assert cluster.supervisor.on_order(Scale((("decode", 2),))) == ""
    await eventually(lambda: FakeActor.made[4].is_killed)
    await eventually(lambda: not cluster.supervisor._leaving)
    FakeActor.may_load.set()
    assert cluster.supervisor.on_order(Scale((("decode", 3),))) == "", "its name is free again"
    await cluster.until(prefill_0="up", prefill_1="up", decode_0="up", decode_1="up", decode_2="up")


async def test_a_pool_may_shrink_while_one_of_it_is_being_replaced(cluster: Cluster) -> None:
    FakeActor.may_load.clear()
    assert cluster.supervisor.on_order(Drain("decode-1", replaces=True)) == ""
    await eventually(lambda: len(FakeActor.made) == 5)
    assert cluster.supervisor.on_order(Scale((("decode", 1),))) == ""
    FakeActor.may_load.set()
    await cluster.until(prefill_0="up", prefill_1="up", decode_0="up")
    await eventually(lambda: FakeActor.made[4].is_killed)


async def test_a_change_of_roles_that_is_taken_back_at_once_ends_in_the_pools_that_were_asked_for_last() -> None:
    one = Cluster(ServeConfig(num_prefill=2, num_decode=1))
    await one.start()
    try:
        assert one.supervisor.on_order(Scale((("prefill", 1), ("decode", 2)))) == ""
        assert one.supervisor.on_order(Scale((("prefill", 2), ("decode", 1)))) == ""
        await one.until(prefill_0="up", prefill_2="up", decode_0="up")
    finally:
        await one.stop()


async def test_a_name_is_not_given_again_before_who_had_it_has_ended(cluster: Cluster) -> None:
    FakeActor.may_stop.clear()
    assert cluster.supervisor.on_order(Scale((("decode", 1),))) == ""
    await cluster.until(prefill_0="up", prefill_1="up", decode_0="up")
    assert cluster.supervisor.on_order(Scale((("decode", 2),))) == ""
    await cluster.until(prefill_0="up", prefill_1="up", decode_0="up", decode_2="up")
    FakeActor.may_stop.set()
    await eventually(lambda: actor_of("decode-1").is_killed)
    assert not actor_of("decode-2").is_killed and len(FakeActor.made) == 5


async def test_one_that_died_and_is_not_wanted_any_more_is_forgotten(cluster: Cluster) -> None:
    FakeActor.may_load.clear()
    await actor_of("decode-1").lives[-1].kill()
    await eventually(lambda: len(FakeActor.made) == 5)
    assert cluster.supervisor.on_order(Scale((("decode", 1),))) == ""
    await cluster.until(prefill_0="up", prefill_1="up", decode_0="up")


async def test_pools_change_by_themselves_where_that_is_on() -> None:
    at_once = AutoscalerConfig(enabled=True, grow_after_s=0.0, cool_down_s=0.0)
    one = Cluster(ServeConfig(num_prefill=1, num_decode=1, autoscaler=at_once))
    await one.start()
    try:
        slow = PoolCounts(num_ended=10, num_in_slo=2, num_looks=1)
        one.supervisor.on_pool_counts("router-0", {Role.DECODE: slow})
        one.supervisor._autoscaling._looked_at = -100.0  # type: ignore[union-attr]
        one.supervisor.on_pool_counts("router-0", {Role.DECODE: slow})
        await one.until(prefill_0="up", decode_0="up", decode_1="up")
        reason = "autoscaler: decode 1 -> 2: 20.0% of requests meet the TPOT SLO, 95.0% should"
        assert reason in await one.events()
    finally:
        await one.stop()


async def test_before_the_cluster_serves_it_takes_no_orders() -> None:
    config = ServeConfig(router=replace(RouterConfig(), mode="colocated"))
    routers: Any = None
    early = Supervisor(config, b"k" * 32, routers, lambda who, what: None, "error")
    assert early.on_order(Drain("worker-0")) == "the cluster is starting"
