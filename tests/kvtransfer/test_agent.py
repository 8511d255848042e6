"""Two agents in one process, over real gRPC and real links."""

from __future__ import annotations

import asyncio
import gc
import os
import secrets
import threading
from collections.abc import AsyncIterator
from dataclasses import replace

import pytest
import pytest_asyncio
import torch

from kvtransfer.config import TransferConfig
from protos.types import PeerRef, Role, TransferFailure, TransferStats
from tests.kvtransfer.workers import CONFIG, LAYOUT, Worker, altered, membership, until

torch.set_num_threads(1)


@pytest_asyncio.fixture
async def pair(request: pytest.FixtureRequest) -> AsyncIterator[tuple[Worker, Worker]]:
    config = replace(CONFIG, transport=getattr(request, "param", "auto"))
    source = await Worker(Role.PREFILL, "p0", config, seed=1).start()
    destination = await Worker(Role.DECODE, "d0", config).start()
    membership(1, source, destination)
    await source.warm("d0")
    yield source, destination
    await source.stop()
    await destination.stop()
    assert source.agent.open_transfers == destination.agent.open_transfers == 0


EACH_TRANSPORT = pytest.mark.parametrize("pair", ["gloo", "shared_memory"], indirect=True)


def start(source: Worker, destination: Worker, num_blocks: int, request_id: str = "r") -> bytes:
    transfer_id = secrets.token_bytes(16)
    destination.agent.expect(transfer_id, source.me, request_id, 1)
    source.agent.open(transfer_id, destination.me, request_id, 1, num_blocks)
    return transfer_id


@EACH_TRANSPORT
async def test_blocks_arrive_whole_chunk_by_chunk(pair: tuple[Worker, Worker]) -> None:
    source, destination = pair
    target = tuple(range(40, 51))
    destination.grants(target)
    transfer_id = start(source, destination, 11)
    source.agent.send_blocks(transfer_id, 0, (3, 1, 4, 15, 9))
    await destination.host.next("offered", transfer_id)
    source.agent.send_blocks(transfer_id, 5, (2, 6, 5, 35, 8, 7))
    source.agent.commit(transfer_id, 4, (17,))
    arrived = await destination.host.next("arrived", transfer_id)
    await source.host.next("closed", transfer_id)
    assert arrived[2:] == (4, (17,), 11 * LAYOUT.block_nbytes)
    sent = source.store.pool[[3, 1, 4, 15, 9, 2, 6, 5, 35, 8, 7]]
    assert torch.equal(destination.store.pool[list(target)], sent)
    assert not destination.store.pool[:40].any()
    assert destination.agent.stats == TransferStats(1, 11 * LAYOUT.block_nbytes, block_nbytes=LAYOUT.block_nbytes)
    sending = source.agent.stats
    assert (sending.num_completed, sending.num_bytes) == (0, 0), "what was sent counts where it was received"
    # The thread that waits for sends may hear of the last one after the acknowledgement.
    await until(lambda: source.agent.stats.links[0].num_bytes >= 11 * LAYOUT.block_nbytes)
    (link,) = source.agent.stats.links
    assert (link.worker_id, link.num_bytes, link.num_queued) == ("d0", 11 * LAYOUT.block_nbytes, 0)
    assert link.transport == source.config.transport
    assert 0 < link.busy_s < 1


async def test_only_what_the_destination_lacks_moves(pair: tuple[Worker, Worker]) -> None:
    source, destination = pair
    destination.grants((20, 21, 22), num_held_blocks=5)
    transfer_id = start(source, destination, 8)
    source.agent.send_blocks(transfer_id, 0, (0, 1, 2))
    source.agent.send_blocks(transfer_id, 3, (3, 4, 5, 6, 7))
    source.agent.commit(transfer_id, 0, (9,))
    arrived = await destination.host.next("arrived", transfer_id)
    assert arrived[4] == 3 * LAYOUT.block_nbytes
    assert torch.equal(destination.store.pool[20:23], source.store.pool[5:8])
    await source.host.next("closed", transfer_id)


async def test_nothing_moves_where_all_is_held(pair: tuple[Worker, Worker]) -> None:
    source, destination = pair
    destination.grants((), num_held_blocks=2)
    transfer_id = start(source, destination, 2)
    source.agent.send_blocks(transfer_id, 0, (0, 1))
    source.agent.commit(transfer_id, 0, (9,))
    assert (await destination.host.next("arrived", transfer_id))[4] == 0
    await source.host.next("closed", transfer_id)


@EACH_TRANSPORT
async def test_many_transfers_share_a_link(pair: tuple[Worker, Worker]) -> None:
    source, destination = pair
    ids = []
    for index in range(16):
        transfer_id = start(source, destination, 3, f"r{index}")
        ids.append(transfer_id)
        await destination.host.next("offered", transfer_id)
        destination.agent.grant(transfer_id, 0, tuple(range(3 * index, 3 * index + 3)))
    for index, transfer_id in enumerate(ids):
        source.agent.send_blocks(transfer_id, 0, (63 - index, 62 - index, 61 - index))
        source.agent.commit(transfer_id, 0, (index,))
    for index, transfer_id in enumerate(ids):
        await destination.host.next("arrived", transfer_id)
        await source.host.next("closed", transfer_id)
        rows = destination.store.pool[3 * index : 3 * index + 3]
        assert torch.equal(rows, source.store.pool[[63 - index, 62 - index, 61 - index]])


async def test_host_refuses(pair: tuple[Worker, Worker]) -> None:
    source, destination = pair
    destination.host.answer = lambda transfer_id, num_blocks: destination.agent.refuse(transfer_id, "no room")
    transfer_id = start(source, destination, 3)
    assert (await source.host.next("refused", transfer_id))[2] == "no room"
    assert destination.host.ends(transfer_id) == []
    assert destination.agent.open_transfers == 0
    assert source.agent.stats.num_failed == ((TransferFailure.REFUSED, 1),)
    assert destination.agent.stats.num_failed == ()


async def test_offer_may_precede_its_announcement(pair: tuple[Worker, Worker]) -> None:
    source, destination = pair
    destination.grants((7,))
    transfer_id = secrets.token_bytes(16)
    source.agent.open(transfer_id, destination.me, "r", 1, 1)
    source.agent.send_blocks(transfer_id, 0, (5,))
    source.agent.commit(transfer_id, 0, (1,))
    await asyncio.sleep(0.2)
    assert destination.host.events == []
    destination.agent.expect(transfer_id, source.me, "r", 1)
    await destination.host.next("arrived", transfer_id)
    assert torch.equal(destination.store.pool[7], source.store.pool[5])
    await source.host.next("closed", transfer_id)


async def test_a_forged_transfer_is_refused(pair: tuple[Worker, Worker]) -> None:
    """Nobody announced it: the host never hears of it."""
    source, destination = pair
    transfer_id = secrets.token_bytes(16)
    source.agent.open(transfer_id, destination.me, "r", 1, 1)
    refused = await source.host.next("refused", transfer_id)
    assert "not announced" in refused[2]
    assert destination.host.events == []


@pytest.mark.parametrize("wrong", ["attempt", "request", "incarnation"])
async def test_an_offer_by_another_than_announced_is_refused(pair: tuple[Worker, Worker], wrong: str) -> None:
    source, destination = pair
    transfer_id = secrets.token_bytes(16)
    former_life = PeerRef("p0", "a-former-life", "127.0.0.1:1", Role.PREFILL)
    expected_source = former_life if wrong == "incarnation" else source.me
    destination.agent.expect(
        transfer_id, expected_source, "other" if wrong == "request" else "r", 2 if wrong == "attempt" else 1
    )
    source.agent.open(transfer_id, destination.me, "r", 1, 1)
    await source.host.next("refused", transfer_id)
    assert destination.host.events == []
    assert destination.agent.open_transfers == 1  # the real one may still come
    destination.agent.abort(transfer_id, "end of test")
    await destination.host.next("lost", transfer_id)


@pytest.mark.parametrize("by_source", [True, False])
@pytest.mark.parametrize("when", ["opened", "granted", "half sent", "committed"])
async def test_abort_in_each_state(pair: tuple[Worker, Worker], when: str, by_source: bool) -> None:
    source, destination = pair
    if when != "opened":
        destination.grants((10, 11, 12, 13))
    transfer_id = start(source, destination, 4)
    await destination.host.next("offered", transfer_id)
    if when in ("half sent", "committed"):
        source.agent.send_blocks(transfer_id, 0, (0, 1))
        await asyncio.sleep(0.05)
    if when == "committed":
        source.store.gate.clear()
        source.agent.send_blocks(transfer_id, 2, (2, 3))
        source.agent.commit(transfer_id, 0, (1,))
        await asyncio.sleep(0.05)
    (source if by_source else destination).agent.abort(transfer_id, "client left")
    if when == "committed":
        await asyncio.sleep(0.1)
        assert source.host.ends(transfer_id) == [], "a gather is under way"
        assert source.store.num_inside == 1
        source.store.gate.set()
    lost = await destination.host.next("lost", transfer_id)
    assert lost[2] == "client left"
    end = "refused" if when == "opened" and not by_source else "closed"
    await source.host.next(end, transfer_id)
    refused_or_aborted = TransferFailure.REFUSED if end == "refused" else TransferFailure.ABORTED
    assert source.agent.stats.num_failed == ((refused_or_aborted, 1),)
    assert destination.agent.stats.num_failed == ((TransferFailure.ABORTED, 1),)
    # The link has survived it.
    destination.grants((30, 31))
    again = start(source, destination, 2)
    source.agent.send_blocks(again, 0, (5, 6))
    source.agent.commit(again, 0, (1,))
    await destination.host.next("arrived", again)
    await source.host.next("closed", again)
    assert torch.equal(destination.store.pool[30:32], source.store.pool[5:7])
    assert len(source.host.ends(transfer_id)) == len(destination.host.ends(transfer_id)) == 1


async def test_lost_waits_for_a_scatter_under_way(pair: tuple[Worker, Worker]) -> None:
    source, destination = pair
    destination.grants((10, 11))
    destination.store.gate.clear()
    transfer_id = start(source, destination, 2)
    source.agent.send_blocks(transfer_id, 0, (0, 1))
    await until(lambda: destination.store.num_inside > 0)
    destination.agent.abort(transfer_id, "client left")
    await asyncio.sleep(0.1)
    assert destination.host.ends(transfer_id) == []
    destination.store.gate.set()
    await destination.host.next("lost", transfer_id)
    assert destination.store.num_inside == 0


async def test_open_without_a_warm_link_is_refused(pair: tuple[Worker, Worker]) -> None:
    source, _ = pair
    stranger = PeerRef("d9", "life", "127.0.0.1:1", Role.DECODE)
    transfer_id = secrets.token_bytes(16)
    source.agent.open(transfer_id, stranger, "r", 1, 1)
    assert source.host.events == [], "not from within the call"
    assert "d9" in (await source.host.next("refused", transfer_id))[2]
    assert source.agent.stats.num_failed == ((TransferFailure.NO_LINK, 1),)


async def test_departed_members_take_their_transfers_along(pair: tuple[Worker, Worker]) -> None:
    source, destination = pair
    announced = secrets.token_bytes(16)
    destination.agent.expect(announced, source.me, "queued", 1)
    destination.grants((10, 11))
    transfer_id = start(source, destination, 2)
    await destination.host.next("offered", transfer_id)
    source.agent.send_blocks(transfer_id, 0, (0,))
    await until(lambda: bool(destination.store.pool[10].any()))
    destination.agent.set_members(2, (destination.me,))
    await destination.host.next("lost", transfer_id)
    await destination.host.next("lost", announced)
    assert destination.agent.stats.num_failed == ((TransferFailure.LINK_LOST, 2),)
    source.agent.set_members(2, (source.me,))
    assert source.agent.warm_links == ()
    await source.host.next("closed", transfer_id)


async def test_close_ends_everything(pair: tuple[Worker, Worker]) -> None:
    source, destination = pair
    destination.grants((10, 11))
    transfer_id = start(source, destination, 2)
    announced = secrets.token_bytes(16)
    destination.agent.expect(announced, source.me, "queued", 1)
    await destination.host.next("offered", transfer_id)
    await destination.agent.close()
    assert destination.host.ends(transfer_id) == destination.host.ends(announced) == ["lost"]
    await source.host.next("closed", transfer_id, timeout_s=2)


async def test_bytes_flipped_on_the_way_are_caught() -> None:
    ends, _ = await _move_flipped("xxh3_64")
    assert ends == ["lost"]
    ends, _ = await _move_flipped("sum64")
    assert ends == ["lost"]


async def test_without_checksum_flipped_bytes_reach_the_pool() -> None:
    """The other test's control: the fault is real, and it is the checksum that catches it."""
    ends, is_equal = await _move_flipped("none")
    assert ends == ["arrived"]
    assert not is_equal


async def _move_flipped(checksum: str) -> tuple[list[str], bool]:
    config = TransferConfig(checksum=checksum, failpoint="flip_received_bytes")  # type: ignore[arg-type]
    source = await Worker(Role.PREFILL, "p0", config, seed=1).start()
    destination = await Worker(Role.DECODE, "d0", config).start()
    membership(1, source, destination)
    await source.warm("d0")
    destination.grants((0, 1))
    transfer_id = start(source, destination, 2)
    source.agent.send_blocks(transfer_id, 0, (0, 1))
    source.agent.commit(transfer_id, 0, (1,))
    await source.host.next("closed", transfer_id)
    ends = destination.host.ends(transfer_id)
    if ends == ["lost"]:
        assert destination.agent.stats == TransferStats(0, 0, ((TransferFailure.CORRUPT, 1),), LAYOUT.block_nbytes)
        assert source.agent.stats.num_failed == ((TransferFailure.ABORTED, 1),), "the cause counts where it was seen"
    is_equal = torch.equal(destination.store.pool[:2], source.store.pool[:2])
    await source.stop()
    await destination.stop()
    return ends, is_equal


@pytest.mark.parametrize(
    ("layout", "config", "reason"),
    [
        (altered(LAYOUT, model_fingerprint="model-b"), CONFIG, "model_fingerprint differs: 'model-a' dials 'model-b'"),
        (altered(LAYOUT, numerics="of another processor"), CONFIG, "numerics differs: '' dials 'of another processor'"),
        (altered(LAYOUT, block_size=8), CONFIG, "block_size differs"),
        (LAYOUT, TransferConfig(chunk_nbytes=CONFIG.chunk_nbytes, checksum="sum64"), "checksum differs"),
    ],
)
async def test_mismatch_is_refused_with_its_reason(layout: object, config: TransferConfig, reason: str) -> None:
    source = await Worker(Role.PREFILL, "p0", CONFIG, seed=1).start()
    destination = await Worker(Role.DECODE, "d0", config, layout=layout).start()  # type: ignore[arg-type]
    membership(1, source, destination)
    await asyncio.sleep(0.5)
    assert source.agent.warm_links == ()
    transfer_id = secrets.token_bytes(16)
    source.agent.open(transfer_id, destination.me, "r", 1, 1)
    assert reason in (await source.host.next("refused", transfer_id))[2]
    assert destination.agent.counters.num_refused_hellos == 1, "dialled once, not in a loop"
    await source.stop()
    await destination.stop()


async def test_a_stale_incarnation_is_refused_and_counted() -> None:
    source = await Worker(Role.PREFILL, "p0", CONFIG, seed=1).start()
    destination = await Worker(Role.DECODE, "d0", CONFIG).start()
    former_life = PeerRef("d0", "a-former-life", destination.me.address, Role.DECODE)
    source.agent.set_members(1, (source.me, former_life))
    await asyncio.sleep(0.3)
    assert source.agent.warm_links == ()
    assert destination.agent.counters.num_refused_hellos == 1
    # A source that is not (yet) a member is turned away for now, and let in once it is one.
    destination.agent.set_members(1, (destination.me,))
    source.agent.set_members(2, (source.me, destination.me))
    await asyncio.sleep(0.3)
    assert source.agent.warm_links == ()
    destination.agent.set_members(2, (source.me, destination.me))
    await source.warm("d0")
    await source.stop()
    await destination.stop()


async def test_a_new_life_of_the_destination_is_linked_anew(pair: tuple[Worker, Worker]) -> None:
    source, old = pair
    await old.stop()
    new = await Worker(Role.DECODE, "d0", CONFIG).start()
    membership(2, source, new)
    await source.warm("d0")
    new.grants((3,))
    transfer_id = start(source, new, 1)
    source.agent.send_blocks(transfer_id, 0, (9,))
    source.agent.commit(transfer_id, 0, (1,))
    await new.host.next("arrived", transfer_id)
    assert torch.equal(new.store.pool[3], source.store.pool[9])
    await source.host.next("closed", transfer_id)
    await new.stop()


async def test_agents_leave_nothing_behind() -> None:
    async def live_once() -> None:
        source = await Worker(Role.PREFILL, "p0", CONFIG, seed=1).start()
        destination = await Worker(Role.DECODE, "d0", CONFIG).start()
        membership(1, source, destination)
        await source.warm("d0")
        await source.stop()
        await destination.stop()

    def count() -> int:
        gc.collect()
        return len(os.listdir("/proc/self/fd"))

    await live_once()
    before = count()
    for _ in range(4):
        await live_once()
    await until(lambda: count() <= before)
    await until(lambda: not [thread for thread in threading.enumerate() if thread.name.startswith("kv-")])
