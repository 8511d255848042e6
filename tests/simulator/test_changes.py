"""Joins, leaves and failures as they are written, and the share in SLO over time that shows them."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from protos.types import Role
from simulator.changes import changes_of, check_in_time
from simulator.run import simulate
from simulator.setup import Change, ChangeKind, Setup
from tests.simulator.values import request, setup

SETUP = setup(num_prefill=4, num_decode=2)


def changes(join: str = "", leave: str = "", fail: str = "", drain: str = "", of: Setup = SETUP) -> tuple[Change, ...]:
    joins, leaves, drains, fails = (text.split(" ") if text else [] for text in (join, leave, drain, fail))
    return changes_of(joins, leaves, drains, fails, of)


def test_workers_are_named_or_counted() -> None:
    assert changes(join="60:prefill*2,decode*1 10:prefill-9", leave="5.5:prefill-0,decode-1") == (
        Change(5.5, ChangeKind.LEAVE, "prefill-0", Role.PREFILL),
        Change(5.5, ChangeKind.LEAVE, "decode-1", Role.DECODE),
        Change(10, ChangeKind.JOIN, "prefill-9", Role.PREFILL),
        Change(60, ChangeKind.JOIN, "prefill-4", Role.PREFILL),
        Change(60, ChangeKind.JOIN, "prefill-5", Role.PREFILL),
        Change(60, ChangeKind.JOIN, "decode-2", Role.DECODE),
    )


def test_counted_workers_take_no_name_that_is_used() -> None:
    names = [change.worker_id for change in changes(join="1:prefill-5 2:prefill*3")]
    assert names == ["prefill-5", "prefill-4", "prefill-6", "prefill-7"]


def test_one_that_failed_may_come_back() -> None:
    kinds = [change.kind for change in changes(fail="1:prefill-2", join="9:prefill-2")]
    assert kinds == [ChangeKind.FAIL, ChangeKind.JOIN]


@pytest.mark.parametrize(
    ("kind", "text", "message"),
    [
        ("join", "prefill*4", r"join must begin with seconds from 0 on, like 60:prefill-3, not 'prefill\*4'"),
        ("fail", "-1:prefill-0", "fail must begin with seconds from 0 on"),
        ("leave", "inf:prefill-0", "leave must begin with seconds from 0 on"),
        ("join", "6:prefill*0", r"join '6:prefill\*0': workers must be like prefill\*4 or prefill-3, not 'prefill\*0'"),
        ("leave", "6:prefill*2", r"leave '6:prefill\*2': workers must be like prefill-3 or prefill-3,prefill-5, not"),
        ("fail", "6:router-0", "workers must be like .* not 'router-0'"),
        ("fail", "6:", "not ''"),
        ("join", "6:prefill-1", "join '6:prefill-1': prefill-1 is up"),
        ("fail", "6:prefill-4", "fail '6:prefill-4': prefill-4 is not up; there are prefill-0, prefill-1,"),
        ("leave", "6:decode-0,decode-1", "leave '6:decode-0,decode-1': no decode worker would be left"),
        ("drain", "6:decode-0,decode-1", "drain '6:decode-0,decode-1': no decode worker would be left"),
    ],
)
def test_what_cannot_be_is_refused(kind: str, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        changes(**{kind: text})  # type: ignore[arg-type]


def test_a_cluster_without_decode_workers_takes_none() -> None:
    with pytest.raises(ValueError, match="a cluster without decode workers takes none"):
        changes(join="6:decode*1", of=setup(num_decode=0))


def test_what_happens_after_the_last_request_is_refused() -> None:
    found = changes(fail="60:prefill-2")
    check_in_time(found, 60.1, 2.0)
    with pytest.raises(ValueError, match=r"fail at 60 s is too late: at 2 requests/s the last one comes at 60\.0 s"):
        check_in_time(found, 60.0, 2.0)


# --- over time ------------------------------------------------------------------------------------------------------


def test_windows_are_by_arrival_and_have_every_request() -> None:
    tight = setup(num_prefill=1, num_decode=0, ttft_slo_s=0.04)
    times = (0.0, 0.9, 1.0, 3.0, 3.001, 3.002)
    requests = [request(at_s, tuple(range(10 * n, 10 * n + 3))) for n, at_s in enumerate(times)]
    result = simulate(tight, requests)
    windows = result.windows(1.0)
    assert [(window.start_s, window.num_requests) for window in windows] == [(0, 2), (1, 1), (2, 0), (3, 3)]
    assert windows[0].attainment == windows[1].attainment == 1
    assert math.isnan(windows[2].attainment)
    assert 0 < windows[3].attainment < 1  # they came at once, and one had to wait
    assert sum(w.num_requests * w.attainment for w in windows if w.num_requests) == pytest.approx(
        result.summary().attainment * len(requests)
    )
    with pytest.raises(ValueError, match="width_s must be above 0, got 0"):
        result.windows(0)


def test_the_loss_of_workers_shows_in_the_windows_after_it() -> None:
    alone = setup(num_prefill=4, num_decode=0, ttft_slo_s=0.5, lease_s=1.0)
    requests = [request(0.01 * n, tuple(range(10 * n, 10 * n + 4))) for n in range(1200)]
    whole = simulate(alone, requests)
    assert all(window.attainment == 1 for window in whole.windows(2.0))
    lost = changes(fail="4:prefill-0,prefill-1,prefill-2", join="8:prefill*3", of=alone)
    windows = simulate(replace(alone, changes=lost), requests).windows(2.0)
    assert windows[0].attainment == 1
    assert min(window.attainment for window in windows[2:4]) < 0.5
    assert windows[-1].attainment == 1


def test_load_is_sampled_when_a_worker_joins_at_that_instant() -> None:
    joins = changes(join="0.5:prefill*1", of=setup(num_prefill=1, num_decode=0))
    joined = replace(setup(num_prefill=1, num_decode=0), changes=joins, load_interval_s=0.25)
    loads = simulate(joined, [request(0.01 * n, (n,)) for n in range(200)]).loads
    assert [len(load.worker_ids) for load in loads[:4]] == [1, 1, 2, 2]
