"""One router and the members of the view that it was given: fake workers over real gRPC, and nobody who decides."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import replace

import pytest

from cluster.view_publisher import ViewPublisher
from router.key_depth import DepthSnapshot
from router.published_view import PublishedView
from router.server import RouterServer
from tests.router.conftest import CONFIG, SERVED, eventually
from tests.router.fake_worker import Fabric, FakeWorker

PATIENT = replace(CONFIG, lease_s=0.5, adapts_key_depth=True)


@pytest.fixture
async def server() -> AsyncIterator[RouterServer]:
    one = RouterServer(PATIENT, SERVED, "router-7")
    await one.start()
    yield one
    await one.stop(0)


@pytest.fixture
async def worker() -> AsyncIterator[FakeWorker]:
    one = FakeWorker("p-0", Fabric())
    await one.start()
    yield one
    await one.kill()


async def lacking(server: RouterServer) -> list[str]:
    return [one.ref.worker_id for one in (await server.news()).lacking]


async def test_a_hello_alone_does_not_bring_a_worker_back(server: RouterServer, worker: FakeWorker) -> None:
    """As from one whose engine hangs: it answers, and is not to be counted as reached."""
    publisher = ViewPublisher(PATIENT, 2)
    publisher.joined(worker.ref, pid=0)
    assert await server.take(publisher.view) == ()
    assert server._status.view_version == publisher.view.version
    worker.is_silent = True
    await eventually(lambda: not server._driver.channels)
    assert server._status.view_version == 0
    assert await lacking(server) == ["p-0"]
    await eventually(lambda: bool(server._driver.channels))
    assert await lacking(server) == ["p-0"]
    worker.is_silent = False
    while await lacking(server):
        pass
    assert server._status.view_version == publisher.view.version


async def test_an_older_view_changes_nothing(server: RouterServer, worker: FakeWorker) -> None:
    publisher = ViewPublisher(PATIENT, 2)
    publisher.joined(worker.ref, pid=4)
    joined = publisher.view
    publisher.left(worker.ref)
    await server.take(publisher.view)
    await server.take(joined)
    assert not server._driver.channels and not server._status.known
    assert server._status.view_version == 2


async def test_published_key_depths_take_the_place_of_its_own(server: RouterServer) -> None:
    links = tuple(bytes([9] * end) for end in range(1, 5))
    view = server._driver.router.view
    assert view.key_depth(links) == 1
    await server.take(PublishedView(1, depths=DepthSnapshot(1, links[:2], ((links[0], 1),))))
    assert view.key_depth(links) == 3
    for _ in range(250):
        view.observe(links)
    assert view.key_depth(links) == 3, "it decides nothing itself any more"
    assert len((await server.news()).observed) == PATIENT.key_depth.window
    assert (await server.news()).observed == ()
