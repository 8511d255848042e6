"""When an operator's order counts as done, by what routers say."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import grpc
import pytest
from typer.testing import CliRunner

from cluster.cli import app
from cluster.client_types import CallFailed, ClusterEvent, Status, WorkerLoad
from cluster.wait_for import end_of_drain, has_sizes, until, worker_to_leave
from protos import worker_pb2 as pb
from protos.worker_pb2_grpc import WorkerServicer, add_WorkerServicer_to_server


def load(worker_id: str, incarnation: str = "1", state: str = "up") -> WorkerLoad:
    role = worker_id.partition("-")[0]
    return WorkerLoad(worker_id, role, incarnation, state, 0, 0, 0, 0, 0, 0, 0, True, 0, 0.0, "", (), 0, 0, ())


def status(*workers: WorkerLoad, events: tuple[ClusterEvent, ...] = ()) -> Status:
    return Status(True, "ready", "disaggregated", "m", "1", 0, 0, 0, 1, workers, events, "router-0")


BEFORE = status(load("prefill-0"), load("decode-0"))


def test_a_worker_has_left_when_this_life_of_it_is_gone() -> None:
    is_over = end_of_drain(BEFORE, "decode-0", replaces=False)
    assert not is_over(BEFORE)
    assert not is_over(status(load("prefill-0"), load("decode-0", state="draining")))
    assert is_over(status(load("prefill-0")))
    assert is_over(status(load("prefill-0"), load("decode-0", "2")))


def test_it_is_replaced_when_another_life_serves() -> None:
    is_over = end_of_drain(BEFORE, "decode-0", replaces=True)
    assert not is_over(BEFORE)
    assert not is_over(status(load("prefill-0")))
    assert not is_over(status(load("prefill-0"), load("decode-0", "2", "down")))
    assert is_over(status(load("prefill-0"), load("decode-0", "2")))


def test_a_router_has_left_when_another_one_says_so_anew() -> None:
    old = (ClusterEvent(5.0, "router-1 has left"), ClusterEvent(6.0, "router-1 is back on 127.0.0.1:1"))
    has_left = end_of_drain(replace(BEFORE, events=old), "router-1", replaces=False)
    is_back = end_of_drain(replace(BEFORE, events=old), "router-1", replaces=True)
    assert not has_left(replace(BEFORE, events=old))
    gone = (*old, ClusterEvent(7.0, "router-1 drains"), ClusterEvent(8.0, "router-1 has left"))
    assert has_left(replace(BEFORE, events=gone))
    assert not is_back(replace(BEFORE, events=gone))
    assert is_back(replace(BEFORE, events=(*gone, ClusterEvent(9.0, "router-1 is back on 127.0.0.1:1"))))


def test_pools_have_their_sizes_when_all_of_theirs_serve_and_no_more() -> None:
    are_there = has_sizes({"prefill": 2, "decode": 0})
    assert are_there(status(load("prefill-0"), load("prefill-3")))
    assert not are_there(status(load("prefill-0")))
    assert not are_there(status(load("prefill-0"), load("prefill-1", state="down")))
    assert not are_there(status(load("prefill-0"), load("prefill-1"), load("decode-0", state="draining")))


def test_a_router_that_does_not_answer_is_asked_again_until_the_time_is_over() -> None:
    answers: Iterator[Status | None] = iter([None, BEFORE, None, status(load("prefill-0"))])

    def ask() -> Status:
        answer = next(answers, None)
        if answer is None:
            raise CallFailed("UNAVAILABLE", "nobody is there")
        return answer

    assert until(end_of_drain(BEFORE, "decode-0", replaces=False), ask, 20.0)
    with pytest.raises(CallFailed, match="nobody is there"):
        until(lambda status: True, ask, 0.0)
    assert not until(lambda status: False, lambda: BEFORE, 0.0)


class Leaver(WorkerServicer):
    """Its server ends soon after it was asked to leave."""

    def __init__(self) -> None:
        self.server = grpc.server(ThreadPoolExecutor(1))
        add_WorkerServicer_to_server(self, self.server)
        self.port = self.server.add_insecure_port("127.0.0.1:0")
        self.server.start()

    def Leave(self, request: pb.LeaveRequest, context: object) -> pb.LeaveResponse:
        threading.Timer(0.2, self.server.stop, (0.0,)).start()
        return pb.LeaveResponse()


def test_a_worker_is_asked_at_its_own_address_and_waited_for() -> None:
    assert worker_to_leave(f"127.0.0.1:{Leaver().port}", 10.0)
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    with pytest.raises(ConnectionError, match=f"no worker answers at 127.0.0.1:{port}"):
        worker_to_leave(f"127.0.0.1:{port}", 10.0)


def test_a_size_that_is_no_number_is_refused_before_anybody_is_asked() -> None:
    result = CliRunner().invoke(app, ["scale", "prefill=many", "--address", "127.0.0.1:1"])
    assert result.exit_code == 2
    assert "'prefill=many' is not POOL=NUMBER" in result.output
