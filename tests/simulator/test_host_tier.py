"""Host memory in whole runs: nothing is lost or left over, what the device is too small for is found there, and copies
take the time that their link takes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.config import HostTierConfig, PullConfig
from engine.events import Copied, CopyBlocks, CopyDirection, Event
from protos.types import Role
from simulator.clock import Clock
from simulator.host_link import HostLink
from simulator.requests import SimRequest
from simulator.run import simulate
from simulator.setup import Change, ChangeKind
from tests.simulator.test_cluster import CAREFULLY, SHAPES, conserved
from tests.simulator.test_fast_forward import outcome
from tests.simulator.values import BLOCK, HARDWARE, request, setup, workloads

HOST = {"num_host_tokens": 200 * BLOCK, "host_link_nbytes_per_s": 5e7}
SMALL = replace(HARDWARE, num_kv_tokens=40 * BLOCK)
ONE = {"num_prefill": 1, "num_decode": 0, "hardware": SMALL}


def sessions(num_sessions: int = 6, num_turns: int = 5) -> list[SimRequest]:
    """Turns of all sessions in turn, each two blocks longer than the last one of its session; together they need 72
    blocks."""
    return [
        request(1.0 * (turn * num_sessions + session), tuple(100 * session + i for i in range(4 + 2 * turn)))
        for turn in range(num_turns)
        for session in range(num_sessions)
    ]


@CAREFULLY
@given(workloads(), SHAPES, st.integers(30, 40), st.sampled_from([1, 20, 200]))
def test_every_request_ends_once_and_nothing_is_left(
    requests: list[SimRequest], shape: dict[str, Any], num_blocks: int, num_host_blocks: int
) -> None:
    """With pulls, so that others are served from host memory."""
    host = {**HOST, "num_host_tokens": num_host_blocks * BLOCK}
    hardware = replace(HARDWARE, num_kv_tokens=num_blocks * BLOCK)
    conserved(setup(**shape, **host, hardware=hardware, pulls=PullConfig(s_per_token=1e-6)), requests)


@CAREFULLY
@given(workloads(), st.integers(30, 40))
def test_several_tokens_in_one_step_change_nothing(requests: list[SimRequest], num_blocks: int) -> None:
    hardware = replace(HARDWARE, num_kv_tokens=num_blocks * BLOCK)
    chosen = setup(num_decode=0, mode="colocated", hardware=hardware, **HOST)
    assert outcome(simulate(chosen, requests)) == outcome(simulate(replace(chosen, fast_forwards=False), requests))


def test_a_worker_may_fail_while_it_copies() -> None:
    changes = (Change(3.7, ChangeKind.FAIL, "prefill-0"), Change(9.0, ChangeKind.JOIN, "prefill-0"))
    chosen = setup(num_decode=0, hardware=SMALL, changes=changes, **{**HOST, "host_link_nbytes_per_s": 1e5})
    conserved(chosen, sessions())


def test_sessions_that_the_device_cannot_hold_are_found_in_host_memory() -> None:
    requests = sessions()
    small, with_host = (simulate(setup(**ONE, **host), requests).records for host in ({}, HOST))
    roomy = simulate(setup(**{**ONE, "hardware": replace(HARDWARE, num_kv_tokens=200 * BLOCK)}), requests).records
    num_cached = [sum(record.num_cached_tokens for record in records) for records in (small, with_host, roomy)]
    assert num_cached[0] < num_cached[1] / 2
    assert num_cached[1] == num_cached[2]  # all that was ever computed
    assert sum(record.wait_s for record in with_host) < sum(record.wait_s for record in small)


def test_a_request_waits_for_its_load_and_no_longer() -> None:
    """The first one that has something in host memory: behind nothing, and on links of two speeds."""
    slow, quick = (
        next(
            record
            for record in simulate(setup(**ONE, **{**HOST, "host_link_nbytes_per_s": rate}), sessions()).records
            if record.pull_s
        )
        for rate in (4e7, 5e7)
    )
    num_blocks = quick.pull_s * 5e7 / (BLOCK * 1000)
    assert num_blocks == pytest.approx(round(num_blocks)) and 1 <= round(num_blocks) <= quick.num_cached_tokens / BLOCK
    assert slow.number == quick.number and slow.pull_s == pytest.approx(quick.pull_s * 5 / 4)
    assert slow.wait_s - quick.wait_s == pytest.approx(slow.pull_s - quick.pull_s)


def test_each_way_of_a_link_does_one_copy_at_a_time() -> None:
    clock, done = Clock(), list[tuple[float, Event]]()
    link = HostLink(clock, 100.0, 50, lambda event: done.append((clock.now, event)))
    for copy_id, direction, num_blocks in (
        (b"a", CopyDirection.TO_HOST, 4),
        (b"b", CopyDirection.TO_HOST, 2),
        (b"c", CopyDirection.TO_DEVICE, 1),
    ):
        link.copy(CopyBlocks(copy_id, direction, tuple(range(num_blocks)), tuple(range(num_blocks))))
    clock.run()
    assert done == [(0.5, Copied(b"c")), (2.0, Copied(b"a")), (3.0, Copied(b"b"))]


def test_only_workers_that_prefill_have_it() -> None:
    chosen = setup(**HOST)
    expected = HostTierConfig(num_blocks=200, s_per_token=1000 / 5e7, max_saving_blocks=4)
    assert chosen.scheduler_of(Role.PREFILL).host == expected
    assert chosen.scheduler_of(Role.DECODE) is chosen.scheduler
    assert setup().scheduler_of(Role.PREFILL).host is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_host_tokens": -1}, "num_host_tokens must not be negative"),
        ({"num_host_tokens": BLOCK - 1}, "make no block"),
        ({"host_link_nbytes_per_s": 0.0}, "host_link_nbytes_per_s must be above 0"),
        ({"host": HostTierConfig(num_blocks=1, s_per_token=0.0)}, "scheduler.host must be None"),
    ],
)
def test_what_could_never_work_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        setup(**changes)
