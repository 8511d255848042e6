"""Serving on a Ray cluster of several nodes that was there before, as in Kubernetes: each worker on the node that has
its role's resource, the router beside a node of its own, and all of it gone afterwards except what was there."""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import grpc
import psutil
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from cluster.config import RayConfig
from cluster.ray_cluster import needed_resources, ray_cluster
from cluster.ray_node import RayUnavailable, ray_folder, ray_node
from protos.inference_pb2_grpc import InferenceStub
from protos.types import Role
from tests.cluster.server import LISTEN, PATIENT, Server, assert_clean, eventually, request
from tests.cluster.test_cli import leftovers, twinring
from tests.tiny_models import save_tiny_model

NUM_LAST_TOKENS = 1500
HEAD, OTHER = "127.0.0.2", "127.0.0.3"  # Ray takes 127.0.0.1 for "this machine's outer address"


def free_port(host: str) -> int:
    with socket.create_server((host, 0)) as probe:
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def ray_start(host: str, resource: str, *arguments: str) -> Iterator[psutil.Process]:
    """One Ray node as an operator starts it; ended by its process ids."""
    with ray_folder() as folder:
        log = Path(folder, "start.log")
        with log.open("wb") as output:
            process = subprocess.Popen(
                [
                    *(sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--disable-usage-stats"),
                    *(f"--node-ip-address={host}", f"--temp-dir={folder}", f"--object-store-memory={80 << 20}"),
                    *("--num-cpus=1", f"--resources={json.dumps({resource: 1})}", "--include-log-monitor=false"),
                    *arguments,
                ],
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        try:
            assert eventually(Path(folder, "ray_current_cluster").exists, 60.0), log.read_text()
            yield psutil.Process(process.pid)
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait(10.0)


@pytest.fixture(scope="module")
def own_place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """`twinring stop` ends every server that it finds, so these have a place of their own."""
    folder = tmp_path_factory.mktemp("place")
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("RAY_AUTH_MODE", "token")
        monkeypatch.setenv("RAY_AUTH_TOKEN", secrets.token_hex(32))
        monkeypatch.delenv("RAY_ADDRESS", raising=False)
        monkeypatch.setenv("TMPDIR", str(folder))
        monkeypatch.setattr(tempfile, "tempdir", str(folder))
        yield folder


@pytest.fixture(scope="module")
def cluster(own_place: Path) -> Iterator[tuple[str, list[psutil.Process]]]:
    """host:port of a Ray cluster that asks for a token, and the processes that started its two nodes."""
    port = free_port(HEAD)
    head_only = (f"--port={port}", f"--ray-client-server-port={free_port(HEAD)}", "--include-dashboard=false")
    with (
        ray_start(HEAD, "for_prefill", "--head", *head_only) as head,
        ray_start(OTHER, "for_decode", f"--address={HEAD}:{port}") as other,
    ):
        yield f"{HEAD}:{port}", [head, other]


def sockets_of(process: psutil.Process) -> set[str]:
    listening = [one.laddr for one in process.net_connections("tcp") if one.status == psutil.CONN_LISTEN]
    return {f"{address.ip.removeprefix('::ffff:')}:{address.port}" for address in listening}


def is_ready(address: str) -> bool:
    with grpc.insecure_channel(address) as channel:
        answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(service="ready"), timeout=5.0)
    return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)


@pytest.mark.ray
@pytest.mark.slow
def test_workers_on_two_nodes_serve_and_leave_only_the_cluster_that_was_there(
    cluster: tuple[str, list[psutil.Process]], tmp_path: Path
) -> None:
    address, nodes = cluster
    before = {process.pid for node in nodes for process in node.children(recursive=True)}
    port = free_port(OTHER)  # the same on both nodes
    server = join(address, tmp_path, f"worker_port={port}", "drain_timeout_s=20")
    try:
        server.wait_ready()
        for worker, host in (("prefill-0", HEAD), ("decode-0", OTHER)):
            listeners = sockets_of(psutil.Process(server.worker_pid(worker)))
            assert f"{host}:{port}" in listeners
            elsewhere = [listener for listener in listeners if not listener.startswith(f"{host}:")]
            assert len(elsewhere) <= 1, elsewhere  # Ray's own, which asks for the token
            assert is_ready(f"{host}:{port}")
        answer = twinring("generate", "This is free software", "--address", server.address, "--max-tokens", "12")
        assert "disaggregated" in answer.stderr, answer.stderr
        assert_clean(server)
        family = server.family()
        own_node = next(process for process in family if process.name() == "raylet")
        folder = re.findall(r"/tmp/twr-\w+", " ".join(own_node.cmdline()))[0]
        stop_in_mid_stream(server)
        assert eventually(lambda: not [process for process in family if process.is_running()], 10.0)
    finally:
        server.stop()
    assert before <= {process.pid for node in nodes for process in node.children(recursive=True)}
    assert "no server is running" in twinring("stop").stderr
    assert not Path(folder).exists()


@pytest.mark.ray
@pytest.mark.slow
def test_a_router_whose_ray_node_ends_goes_with_it(cluster: tuple[str, list[psutil.Process]], tmp_path: Path) -> None:
    """Without Ray it can replace no worker: whatever started it is to start it again."""
    server = join(cluster[0], tmp_path)
    try:
        server.wait_ready()
        family = server.family()
        next(process for process in family if process.name() == "raylet").kill()
        assert server.process.wait(40.0) == 1
        assert "the Ray node that had joined" in server.log.read_text()
        assert eventually(lambda: not [process for process in family if process.is_running()], 10.0)
    finally:
        server.stop()


def join(address: str, folder: Path, *settings: str) -> Server:
    settings = (
        *PATIENT,
        *("ray.join_as_node=true", "ray.prefill_resource=for_prefill", "ray.decode_resource=for_decode"),
        *("worker_bind_host=auto", "transfer.bind_host=auto", "ray.schedule_timeout_s=60", *settings),
    )
    model = str(save_tiny_model(folder / "model", "llama"))
    options = [option for setting in settings for option in ("--set", setting)]
    return Server(["--model", model, "--address", address, *options], folder / "serve.log")


def stop_in_mid_stream(server: Server) -> None:
    """A stream that runs when `twinring stop` comes still gets all of its tokens."""
    with grpc.insecure_channel(server.address) as channel:
        stream = InferenceStub(channel).Generate(request([1, 2, 3], NUM_LAST_TOKENS, ignore_eos=True), timeout=60.0)
        next(stream)
        with subprocess.Popen([sys.executable, "-m", "cluster.cli", "stop"], stderr=subprocess.PIPE, text=True) as stop:
            assert eventually(lambda: "stopping" in server.log.read_text(), 20.0)
            assert list(stream)[-1].complete.completion_tokens == NUM_LAST_TOKENS
            assert server.process.wait(20.0) == 0  # collected here, or `stop` would go on seeing a process
            said = stop.communicate(timeout=20.0)[1]
    assert (stop.returncode, said.strip()) == (0, f"stopped {server.address}")


@pytest.mark.parametrize(
    ("address", "timeout_s", "words"),
    [("nonsense", 60.0, "ended: .*nonsense"), ("127.0.0.1:6379", 0.0, "is not up after 0 s")],
)
def test_a_node_that_does_not_come_up_leaves_nothing(address: str, timeout_s: float, words: str) -> None:
    there_before, children = leftovers(), psutil.Process().children(recursive=True)
    with pytest.raises(RayUnavailable, match=f"join {address} {words}"), ray_node(address, timeout_s):
        pass
    assert leftovers() <= there_before
    assert psutil.Process().children(recursive=True) == children


@pytest.mark.ray
def test_a_worker_port_that_is_taken_is_named_without_a_traceback() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        one_worker = ("--mode", "colocated", "--prefill", "1", "--decode", "0", *LISTEN)
        answer = twinring("serve", *one_worker, "--set", f"worker_port={port}", timeout_s=150.0)
    assert answer.returncode == 1
    said = " ".join(answer.stderr.split())
    assert f"error: worker worker-0 cannot listen on 127.0.0.1:{port}" in said
    assert "Traceback" not in said


def test_the_resources_of_each_role_are_asked_for() -> None:
    roles = [Role.PREFILL, Role.PREFILL, Role.DECODE]
    apart = RayConfig(prefill_resource="p", decode_resource="d", num_cpus_per_worker=0.5)
    assert needed_resources(apart, roles) == {"CPU": 1.5, "GPU": 0.0, "p": 2, "d": 1}
    assert needed_resources(RayConfig(prefill_resource="w", decode_resource="w"), roles)["w"] == 3
    assert needed_resources(RayConfig(), roles).keys() == {"CPU", "GPU"}


def test_a_node_waits_for_its_head_no_longer_than_it_was_told() -> None:
    config = RayConfig(address="127.0.0.1:1", join_as_node=True, schedule_timeout_s=0.6)
    with pytest.raises(RayUnavailable, match=r"no Ray cluster at 127\.0\.0\.1:1"), ray_cluster(config, []):
        pass
